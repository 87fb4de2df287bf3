#!/usr/bin/env bash
# NumPy 2.4.6: functions that leave out NaN do not do so for the bfloat16 of ml_dtypes.
#
# Versions: numpy 2.4.6, ml_dtypes 0.6.0 (Linux x86-64, CPython 3.11).
#
# Behavior. `isnan` knows the NaN of a bfloat16 array. Even so `nan_to_num` returns it as it is,
# `nansum` and `nanmean` are NaN, `nanargmax` names the place of the NaN, and `sort` leaves NaN
# first, where it puts that of float16 last. So `median` of NaN, 1 and 2 is 1 instead of NaN. Nothing
# warns. The dtypes of ml_dtypes are of kind "V"; these functions look for NaN in kinds "f" and "c".
#
# Output seen:
#   nan_to_num of NaN, 1, 2: bfloat16 [nan, 1.0, 2.0], float16 [0.0, 1.0, 2.0]
#   nansum     of NaN, 1, 2: bfloat16 nan, float16 3.0
#   nanmean    of NaN, 1, 2: bfloat16 nan, float16 1.5
#   nanargmax  of NaN, 1, 2: bfloat16 0.0, float16 2.0
#   sort       of NaN, 1, 2: bfloat16 [nan, 1.0, 2.0], float16 [1.0, 2.0, nan]
#   median     of NaN, 1, 2: bfloat16 1.0, float16 nan
#
# Expected: what the same numbers give in float16, or an error.
#
# Why it matters: who compares results in bfloat16, with NaN in what must not be read, gets NaN for a
# tolerance, which nothing is smaller than, or a median that looks like a number. What is right is
# `array.astype("float32")` before any of these.
#
# Exits 0 while the behavior is as described, 1 if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install -qq --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0

cat >"$work/check.py" <<'PYTHON'
import warnings

import ml_dtypes
import numpy as np

array = np.array([np.nan, 1, 2], ml_dtypes.bfloat16)
same = array.astype(np.float16)
assert np.isnan(array).tolist() == np.isnan(same).tolist() == [True, False, False]

seen = []
for name in "nan_to_num", "nansum", "nanmean", "nanargmax", "sort", "median":
    function = getattr(np, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = np.asarray(function(array)).astype(float).tolist()
        warnings.simplefilter("ignore")  # of float16's median it is told that there is NaN
        other = np.asarray(function(same)).astype(float).tolist()
    print(f"{name:10} of NaN, 1, 2: bfloat16 {one}, float16 {other}")
    seen.append(f"{one} {other}")
as_described = seen == [
    "[nan, 1.0, 2.0] [0.0, 1.0, 2.0]",
    "nan 3.0",
    "nan 1.5",
    "0.0 2.0",
    "[nan, 1.0, 2.0] [1.0, 2.0, nan]",
    "1.0 nan",
]
raise SystemExit(0 if as_described else "The behavior has changed")
PYTHON
"$python" "$work/check.py"
