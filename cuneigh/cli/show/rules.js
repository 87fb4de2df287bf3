// The window rules, as cuneigh/_window.py states them, and the boxes of a block, as
// cuneigh/cli/show/scene.py finds them: twins of both, and tested against them.
"use strict";

/** Queries of a dilation group of an axis. */
function groupLength(axis, group) {
  return Math.floor((axis.length - group + axis.dilation - 1) / axis.dilation);
}

/** The half-open range of key indices that query `index` of `group` sees; on a ring unrolled. */
function windowOf(axis, index, group) {
  const k = axis.kernel_size, s = axis.stride, length = groupLength(axis, group);
  const offset = axis.is_causal ? s - 1 : Math.floor(s / 2);
  const leader = Math.min(Math.floor(index / s) * s + offset, length - 1);
  if (axis.is_causal) return [Math.max(leader - k + 1, 0), index + 1];
  const begin = leader - Math.floor(k / 2);
  if (axis.border === "wrap") return [begin, begin + k];
  if (axis.border === "cut") return [Math.max(begin, 0), Math.min(begin + k, length)];
  const start = Math.min(Math.max(begin, 0), length - k);
  return [start, start + k];
}

/** The tokens along an axis that token x sees. */
function seenBy(axis, x) {
  const group = x % axis.dilation;
  const [begin, end] = windowOf(axis, Math.floor(x / axis.dilation), group);
  const seen = tokensOf(axis, group, begin, end), n = axis.length;
  return axis.border === "wrap" ? seen.map((token) => ((token % n) + n) % n) : seen;
}

/** The tokens of a group with these indices. */
function tokensOf(axis, group, begin, end) {
  const found = [];
  for (let index = begin; index < end; index++) found.push(index * axis.dilation + group);
  return found;
}

/** Along an axis, the queries of the part and the block of token x, and the boxes of keys. */
function blockOf(axis, x, part, parts, columns) {
  const d = axis.dilation, group = x % d, index = Math.floor(x / d);
  const length = groupLength(axis, group);
  const rows = (size) => {
    const first = Math.floor(index / size) * size;
    return [first, Math.min(first + size, length)];
  };
  const [partBegin, partEnd] = rows(part), [blockBegin, blockEnd] = rows(part * parts);
  const begin = windowOf(axis, blockBegin, group)[0];
  const end = windowOf(axis, blockEnd - 1, group)[1];
  const someBegin = windowOf(axis, partBegin, group)[0];
  const someEnd = windowOf(axis, partEnd - 1, group)[1];
  const allBegin = windowOf(axis, partEnd - 1, group)[0];
  const allEnd = windowOf(axis, partBegin, group)[1];
  const keys = [];
  for (let low = begin; low < end; low += columns) {
    const high = low + columns;
    keys.push({
      tokens: tokensOf(axis, group, low, Math.min(high, length)),
      some: low < someEnd && high > someBegin,
      all: allBegin <= low && high <= allEnd,
    });
  }
  return {
    part: tokensOf(axis, group, partBegin, partEnd),
    block: tokensOf(axis, group, blockBegin, blockEnd),
    keys,
  };
}
