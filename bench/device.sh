#!/usr/bin/env bash
# Everything that needs a GPU, in one call. Results are written to $OUT (default: bench/results).
#
#     bench/device.sh [STEP ..]      steps: tests sanitizer doctor demo host loads memory scaling
#                                    naive grid h200 profile (the default: all of these), soak,
#                                    attack, alternate, tune, calibrate, derivatives, two, decode,
#                                    masks, tiles, beside
#
# `soak` runs random problems through the Hopper kernels for $SECONDS_OF_SOAK (default: 400), which
# takes a GPU of compute capability 9.0. `attack` compares random calls of all backends with dense
# float64 for $SECONDS_OF_ATTACK (default: 150), and tries what is hard: numbers that are not finite,
# more than 2^31 elements, threads with a stream each, memory that runs out.
#
# `two` needs two GPUs of one host: the tests for them, then one layout over both against one of them.
#
# `alternate` compares this checkout with an older one, whose folder is $OLD, by turns on this GPU:
#
#     mkdir old && git archive COMMIT | tar -x -C old && OLD=old bench/device.sh alternate
#
# A step that fails does not stop the others; the exit status says whether all of them passed.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=0

# With a line for each test, so that a run that is cut short says which have failed.
tests() {
  python3 -m pytest -m "gpu and not multi_gpu" -n "${JOBS:-8}" -p no:cacheprovider -p no:benchmark -v --tb=short -rs 2>&1 |
    tee "$OUT/gpu-tests.txt" | grep -v PASSED | tail -n 60
  return "${PIPESTATUS[0]}"
}

# Of the backends in $BACKENDS (default: all). The tools run side by side, and so do the ranks and
# some of the operations. Kernels are compiled before that, on all processors.
sanitizer() {
  local tool rank part status=0 jobs=()
  local -A parts=([a]="forward jvp hvp" [b]="backward float16"
    [c]="backward bfloat16 float32 float64" [d]="qk qk_backward av av_backward")
  for rank in 1 2 3; do
    python3 tests/helpers/small_shapes.py --compile $rank ${BACKENDS:-} &
    RACECHECK=1 python3 tests/helpers/small_shapes.py --compile $rank ${BACKENDS:-} &
  done
  wait
  for tool in memcheck racecheck synccheck; do
    for rank in 1 2 3; do
      for part in a b c d; do
        RACECHECK=$([ $tool = racecheck ] && echo 1) compute-sanitizer --tool $tool --error-exitcode 1 \
          python3 tests/helpers/small_shapes.py $rank ${parts[$part]} ${BACKENDS:-} \
          >"$OUT/sanitizer-$tool-$rank$part.txt" 2>&1 &
        jobs+=($!)
      done
    done
  done
  for job in "${jobs[@]}"; do wait "$job" || status=1; done
  tail -n 2 "$OUT"/sanitizer-*check-*.txt
  # Racecheck has nothing to find in the lifetimes: it looks at shared memory.
  compute-sanitizer --tool memcheck --error-exitcode 1 python3 tests/helpers/lifetimes.py \
    >"$OUT/sanitizer-lifetimes.txt" 2>&1 || status=1
  tail -n 3 "$OUT/sanitizer-lifetimes.txt"
  return $status
}

soak() {
  python3 tests/helpers/soak.py --seconds "${SECONDS_OF_SOAK:-400}" --jobs "${JOBS:-8}" 2>&1 |
    tee "$OUT/soak.txt" | tail -n 20
  return "${PIPESTATUS[0]}"
}

attack() {
  python3 tests/helpers/attack.py --seconds "${SECONDS_OF_ATTACK:-150}" 2>&1 |
    tee "$OUT/attack.txt" | tail -n 40
  return "${PIPESTATUS[0]}"
}

memory() { python3 bench/memory.py --output "$OUT/memory.json"; }
host() { python3 bench/host.py --output "$OUT/host.json"; }
# First calls, cold and warm, beside those of the peers that are installed.
loads() { python3 bench/loads.py --output "$OUT/loads.json"; }
# Rates fitted to this GPU, and what choices by them cost on the case set; about eight minutes.
calibrate() { python3 bench/calibrate.py --output "$OUT/calibrate.json"; }
scaling() { python3 bench/scaling.py --output "$OUT/scaling.json"; }

h200() { python3 bench/h200.py --output "$OUT/h200.json" | tail -n 60; return "${PIPESTATUS[0]}"; }
# Tangents and second derivatives in PyTorch.
derivatives() { python3 bench/derivatives.py --output "$OUT/derivatives.json"; }
two() {
  local status=0
  timeout 300 python3 -m pytest -m multi_gpu -n "${JOBS:-4}" -p no:cacheprovider -p no:benchmark -q --tb=short -rs 2>&1 |
    tee "$OUT/multi-gpu-tests.txt" | tail -n 60
  [ "${PIPESTATUS[0]}" = 0 ] || status=1
  python3 bench/two_gpus.py --output "$OUT/two-gpus.json" || status=1
  return $status
}
# A decoder's attention to its cache of keys: about two minutes.
decode() {
  python3 bench/decode.py --output "$OUT/decode.json" | tee "$OUT/decode.txt"
  return "${PIPESTATUS[0]}"
}
# What a key mask costs, beside calls without one: about two minutes.
masks() { python3 bench/masks.py --output "$OUT/masks.json"; }
# A layout in host memory in tiles, beside one call: about half a minute.
tiles() { python3 bench/tiles.py --output "$OUT/tiles.json"; }
# Long windows beside FlashAttention-4, by turns; it must be installed.
beside() { python3 bench/beside.py --output "$OUT/beside.json"; }
naive() { python3 bench/naive.py --output "$OUT/naive.json" | tail -n 12; return "${PIPESTATUS[0]}"; }
grid() {
  python3 bench/paper_grid.py --backward-dim 64 --output "$OUT/paper-grid.json" | tail -n 20
  return "${PIPESTATUS[0]}"
}
alternate() {
  python3 bench/alternate.py --old "${OLD:?the folder of an older checkout}" \
    --output "$OUT/alternate.json" | tee "$OUT/alternate.txt"
  return "${PIPESTATUS[0]}"
}
# What a result file says of paths is relative to the checkout and to the home directory.
relative() { sed -e "s|$PWD/||g" -e "s|$PWD||g" -e "s|$HOME|~|g"; }
doctor() { python3 -m cuneigh doctor | relative | tee "$OUT/doctor.txt"; return "${PIPESTATUS[0]}"; }
demo() {
  { time (cd "$OUT" && python3 -m cuneigh demo --output demo.jpg); } 2>&1 | relative | tee "$OUT/demo.txt"
  return "${PIPESTATUS[0]}"
}

# Whatever peers are installed beside it; FlexAttention is compiled anew for every problem.
profile() {
  {
    python3 -m cuneigh profile -i 256 256 -n 24 -d 128 -w 80 80 -s 16 16 --backward --peers &&
      python3 -m cuneigh profile -i 56 56 -b 128 -n 2 -d 32 -w 7 --backward --peers &&
      python3 -m cuneigh profile --cases bench/cases.json --dry-run
  } | tee "$OUT/profile.txt"
  return "${PIPESTATUS[0]}"
}

# In a cache of its own, so that no other step takes the plans that it keeps.
tune() {
  CUNEIGH_CACHE_DIR=$(mktemp -d) python3 -m cuneigh profile --cases bench/cases.json --backward \
    --case seq4k-w65 nat-stage1 hdit-128 video-causal --tune | tee "$OUT/tune.txt"
  return "${PIPESTATUS[0]}"
}

[ $# -gt 0 ] || set -- tests sanitizer doctor demo host loads memory scaling naive grid h200 profile
for step in "$@"; do
  echo "== $step"
  "$step" || { echo "== $step FAILED"; failed=1; }
done
exit $failed
