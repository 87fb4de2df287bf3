#!/usr/bin/env bash
# Everything that needs a GPU, in one call. Results are written to $OUT (default: bench/results).
#
#     bench/device.sh [STEP ..]      steps: tests sanitizer naive doctor demo; default: all
#
# A step that fails does not stop the others; the exit status says whether all of them passed.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=0

tests() {
  python3 -m pytest -m "gpu" -n "${JOBS:-8}" -p no:cacheprovider -p no:benchmark -q --tb=short -rs 2>&1 |
    tee "$OUT/gpu-tests.txt" | tail -n 60
  return "${PIPESTATUS[0]}"
}

sanitizer() {
  local tool status=0
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 python3 tests/small_shapes.py \
      >"$OUT/sanitizer-$tool.txt" 2>&1 || status=1
    tail -n 4 "$OUT/sanitizer-$tool.txt"
  done
  return $status
}

naive() { python3 bench/naive.py --output "$OUT/naive.json" | tail -n 12; return "${PIPESTATUS[0]}"; }
doctor() { python3 -m cuneigh doctor | tee "$OUT/doctor.txt"; return "${PIPESTATUS[0]}"; }
demo() {
  (cd "$OUT" && time python3 -m cuneigh demo) 2>&1 | tee "$OUT/demo.txt"
  return "${PIPESTATUS[0]}"
}

for step in "${@:-tests sanitizer naive doctor demo}"; do
  for name in $step; do
    echo "== $name"
    "$name" || { echo "== $name FAILED"; failed=1; }
  done
done
exit $failed
