// The page: sliders change `state`, and `draw` shows it. `START` is what it begins with.
"use strict";

const COLORS = {
  token: "#f0f1f4", seen: "#2f6fdb", query: "#d62839", full: "#bfe3c6", partial: "#fbe3a6",
  skipped: "#dcdee3", part: "#7b2cbf", block: "#b79ad9", box: "#9a8c5c",
};
const NAMES = ["kernel_size", "stride", "dilation", "is_causal", "border"];
const LEAST = { stride: 1, dilation: 1, is_causal: false, border: "shift" };
const state = structuredClone(START);
const rank = state.axes.length;
const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d");
let panels = {};

/** The largest legal value of each slider, given the others. */
function most(axis, name) {
  if (name === "length") return Math.max(64, START.longest);
  const isCut = axis.border === "cut";
  if (name === "kernel_size") return isCut ? 2 * axis.length : Math.floor(axis.length / axis.dilation);
  if (name === "stride") return axis.kernel_size;
  if (name === "dilation") return isCut ? axis.length : Math.floor(axis.length / axis.kernel_size);
  return Math.max(32, ...Object.values(START.cut).flat()); // of boxes
}

/** A slider of the number `name` of `owner`. */
function slider(owner, name, axis, label) {
  const row = document.createElement("label"), input = document.createElement("input");
  const value = document.createElement("output");
  row.append(Object.assign(document.createElement("span"), { textContent: label }), input, value);
  Object.assign(input, { type: "range", min: 1 });
  input.setAttribute("aria-label", `${label} of axis ${axis}`);
  input.oninput = () => { owner[name] = Number(input.value); legalize(); draw(); };
  refreshers.push(() => {
    input.max = most(state.axes[axis], name);
    input.value = owner[name];
    value.textContent = owner[name];
  });
  return row;
}
const refreshers = [];

/** A check box of the flag `name` of `owner`. */
function check(owner, name, label) {
  const row = document.createElement("label"), input = document.createElement("input");
  input.type = "checkbox";
  input.oninput = () => { owner[name] = input.checked; legalize(); draw(); };
  row.append(Object.assign(document.createElement("span"), { textContent: label }), input);
  refreshers.push(() => { input.checked = owner[name]; });
  return row;
}

/** A choice of the border of `axis`. */
function choice(axis, r) {
  const row = document.createElement("label"), input = document.createElement("select");
  for (const name of ["shift", "cut", "wrap"]) input.append(new Option(name));
  row.append(Object.assign(document.createElement("span"), { textContent: "border" }), input);
  input.setAttribute("aria-label", `border of axis ${r}`);
  input.oninput = () => { axis.border = input.value; legalize(); draw(); };
  refreshers.push(() => { input.value = axis.border; });
  return row;
}

/** Keep every value within what the others leave; a smaller length comes first. */
function legalize() {
  state.axes.forEach((axis, r) => {
    axis.kernel_size = Math.min(axis.kernel_size, axis.border === "cut" ? 2 * axis.length : axis.length);
    if (axis.is_causal && axis.border === "wrap") axis.border = "shift"; // a ring has no order
    axis.dilation = Math.min(axis.dilation, most(axis, "dilation"));
    while (axis.border === "wrap" && axis.length % axis.dilation) axis.dilation -= 1;
    axis.stride = Math.min(axis.stride, axis.kernel_size);
    state.query[r] = Math.min(state.query[r], axis.length - 1);
  });
}

function controls() {
  const place = document.querySelector("#controls");
  state.axes.forEach((axis, r) => {
    const group = document.createElement("fieldset");
    group.append(Object.assign(document.createElement("legend"), { textContent: `axis ${r}` }));
    for (const name of ["length", "kernel_size", "stride", "dilation"])
      group.append(slider(axis, name, r, name));
    group.append(check(axis, "is_causal", "is_causal"));
    if (!state.cut) group.append(choice(axis, r));
    if (state.cut) {
      const names = { part: "queries of a part", parts: "parts of a block", columns: "keys of a box" };
      for (const name in names) group.append(slider(state.cut[name], r, r, names[name]));
    }
    place.append(group);
  });
  if (state.cut) document.querySelector("#switch").append(check(state, "boxes", "boxes of the block"));
}

/** The product of tokens along each axis, as [slice, row, column]. */
function* product(tokens) {
  const padded = [...Array(3 - rank).fill([0]), ...tokens];
  for (const z of padded[0]) for (const y of padded[1]) for (const x of padded[2]) yield [z, y, x];
}

/** Where the slices lie on the canvas, and how large a token is. */
function arrange() {
  const [depth, rows, columns] = [...Array(3 - rank).fill(1), ...state.axes.map((a) => a.length)];
  const width = document.querySelector("main").clientWidth - 24, gap = 14;
  let cell = Math.floor((depth === 1 ? width : Math.min(width, 330)) / columns);
  cell = Math.max(3, Math.min(cell, Math.floor(Math.max(innerHeight - 420, 320) / rows), 26));
  const across = Math.max(1, Math.floor((width + gap) / (columns * cell + gap)));
  const down = Math.ceil(depth / across), head = depth > 1 ? 16 : 0;
  panels = { cell, across, depth, rows, columns, head, gap };
  canvas.width = Math.min(across, depth) * (columns * cell + gap);
  canvas.height = down * (rows * cell + gap + head);
}

function corner(z) {
  const { cell, across, rows, columns, head, gap } = panels;
  return [(z % across) * (columns * cell + gap), Math.floor(z / across) * (rows * cell + gap + head) + head];
}

function fill(tokens, color, share) {
  const { cell } = panels, side = Math.max(1, share * cell), shift = (cell - side) / 2;
  pen.fillStyle = color;
  for (const [z, y, x] of product(tokens)) {
    const [left, top] = corner(z);
    pen.fillRect(left + x * cell + shift, top + y * cell + shift, side, side);
  }
}

function outline(tokens, color, width = 2) {
  const { cell } = panels, inside = new Set([...product(tokens)].map(String));
  pen.strokeStyle = color;
  pen.lineWidth = width;
  pen.beginPath();
  for (const [z, y, x] of product(tokens)) {
    const [left, top] = corner(z), a = left + x * cell, b = top + y * cell;
    const edges = [[y - 1, x, a, b, a + cell, b], [y + 1, x, a, b + cell, a + cell, b + cell],
      [y, x - 1, a, b, a, b + cell], [y, x + 1, a + cell, b, a + cell, b + cell]];
    for (const [v, u, x0, y0, x1, y1] of edges)
      if (!inside.has(String([z, v, u]))) { pen.moveTo(x0, y0); pen.lineTo(x1, y1); }
  }
  pen.stroke();
}

function draw() {
  refreshers.forEach((refresh) => refresh());
  arrange();
  const { axes, query, cut } = state, { cell, depth } = panels;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  fill(axes.map((axis) => [...Array(axis.length).keys()]), COLORS.token, cell > 5 ? 0.92 : 1);
  const seen = axes.map((axis, r) => seenBy(axis, query[r]));
  const counts = { full: 0, partial: 0, skipped: 0 };
  let blocks = null;
  if (cut && state.boxes) {
    blocks = axes.map((a, r) => blockOf(a, query[r], cut.part[r], cut.parts[r], cut.columns[r]));
    let boxes = [[]];
    for (const along of blocks) boxes = boxes.flatMap((box) => along.keys.map((key) => [...box, key]));
    for (const box of boxes) {
      const status = !box.every((key) => key.some) ? "skipped" : box.every((key) => key.all) ? "full" : "partial";
      counts[status] += 1;
      fill(box.map((key) => key.tokens), COLORS[status], cell > 5 ? 0.92 : 1);
      if (axes.every((axis) => axis.dilation === 1)) outline(box.map((key) => key.tokens), COLORS.box, 1);
    }
  }
  fill(seen, COLORS.seen, 0.6);
  fill(query.map((x) => [x]), COLORS.query, 0.9);
  if (blocks) {
    outline(blocks.map((along) => along.block), COLORS.block);
    outline(blocks.map((along) => along.part), COLORS.part);
  }
  if (depth > 1) {
    pen.fillStyle = "#444";
    pen.font = "11px sans-serif";
    for (let z = 0; z < depth; z++) pen.fillText(`slice ${z}`, corner(z)[0], corner(z)[1] - 4);
  }
  tell(seen, blocks && counts);
}

/** The words below the picture. */
function tell(seen, counts) {
  const tuple = (name, text) => {
    const values = state.axes.map((axis) => text(axis[name]));
    return rank === 1 ? values[0] : `(${values.join(", ")})`;
  };
  const python = { is_causal: (flag) => (flag ? "True" : "False"), border: (name) => `"${name}"` };
  const given = NAMES.filter((name) => name === "kernel_size" || state.axes.some((a) => a[name] !== LEAST[name]));
  const call = given.map((name) => `${name}=${tuple(name, python[name] || String)}`).join(", ");
  const keys = seen.reduce((product, along) => product * along.length, 1);
  const ranges = seen.map((along) => `${along[0]} to ${along.at(-1)}`).join(", ");
  document.querySelector("#words").textContent =
    `Query (${state.query.join(", ")}) sees ${keys} keys: ${ranges}.` +
    (counts ? ` Its part of the block multiplies ${counts.full} boxes of keys without a mask and ${counts.partial} with one, and passes over ${counts.skipped}.` : "");
  document.querySelector("#call").textContent = `cuneigh.na${rank}d(query, key, value, ${call})`;
}

/** The query is the token under the pointer. */
canvas.onpointermove = (event) => {
  const { cell, across, rows, columns, head, gap, depth } = panels;
  const x = event.offsetX, y = event.offsetY, wide = columns * cell + gap, high = rows * cell + gap + head;
  const z = Math.floor(y / high) * across + Math.floor(x / wide);
  const at = [z, Math.floor(((y % high) - head) / cell), Math.floor((x % wide) / cell)];
  if (z < depth && at[1] >= 0 && at[1] < rows && at[2] < columns) {
    state.query = at.slice(3 - rank);
    draw();
  }
};
canvas.onkeydown = (event) => {
  const steps = { ArrowLeft: [rank - 1, -1], ArrowRight: [rank - 1, 1], ArrowUp: [rank - 2, -1], ArrowDown: [rank - 2, 1], PageUp: [rank - 3, -1], PageDown: [rank - 3, 1] };
  const [r, step] = steps[event.key] || [-1, 0];
  if (r < 0) return;
  state.query[r] = Math.min(Math.max(state.query[r] + step, 0), state.axes[r].length - 1);
  event.preventDefault();
  draw();
};
addEventListener("resize", draw);
controls();
draw();
