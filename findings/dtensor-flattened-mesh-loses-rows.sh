#!/usr/bin/env bash
# PyTorch 2.13.0: DTensor.full_tensor() loses rows once two axes of its mesh were flattened.
#
# Versions: torch 2.13.0, numpy 2.4.6 (Linux x86-64, CPython 3.11, gloo, no GPU needed).
#
# Behavior. A tensor of 5 rows is Shard(0) along both axes of a 2 x 2 mesh: the first cuts it in 3
# and 2 rows, the second cuts these in 2 and 1, and 1 and 1. full_tensor() gives the 5 rows back.
# After `mesh._flatten()`, as for a process group of both axes, the same call on the same tensor
# gives [1, 2, 3, 0, 4]: it gathers along the flattened axis by a single all-gather, and takes the
# shards for those of 5 rows over 4 ranks, 2, 2, 1 and 0. A warning of PyTorch recommends this very
# flattening ("To optimize, flatten mesh dimensions so DTensor can use a single operation instead").
# Where shards of shards are even, all is well.
#
# Output seen (every rank prints the same; that of rank 0):
#   before: 2 rows [1, 2], 3 rows [1, 2, 3], 5 rows [1, 2, 3, 4, 5], 6 rows [1, 2, 3, 4, 5, 6]
#   after:  2 rows [1, 0], 3 rows [1, 2, 3], 5 rows [1, 2, 3, 0, 4], 6 rows [1, 2, 3, 0, 4, 5]
#
# Expected: the rows, as before; or two gathers where shards of shards are not those of one cut.
#
# Why it matters: nothing is raised, and shapes are right. A library that needs a group of several
# axes of a caller's mesh, and makes it by the mesh's own method, changes the numbers of tensors
# that it never sees. A group made by torch.distributed.new_group instead does no harm.
#
# Exits 0 while the behavior is as described, 1 if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat >"$work/check.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

ROWS = 2, 3, 5, 6
AFTER = {2: [1, 0], 3: [1, 2, 3], 5: [1, 2, 3, 0, 4], 6: [1, 2, 3, 0, 4, 5]}


def gathered(mesh):
    found = {}
    for rows in ROWS:
        whole = torch.arange(1.0, rows + 1)
        cut = distribute_tensor(whole, mesh, [Shard(0), Shard(0)], src_data_rank=None)
        found[rows] = cut.full_tensor().int().tolist()
    return found


def run(rank):
    method = f"file://{sys.argv[1]}/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    before = gathered(mesh)
    mesh._flatten()
    after = gathered(mesh)
    if rank == 0:
        for name, found in (("before:", before), ("after: ", after)):
            print(name, ", ".join(f"{rows} rows {values}" for rows, values in found.items()))
    dist.destroy_process_group()
    return before == {rows: [*range(1, rows + 1)] for rows in ROWS} and after == AFTER


children = []
for rank in range(4):
    if not (child := os.fork()):
        try:
            os._exit(not run(rank))
        finally:
            os._exit(1)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
PYTHON
"$python" -W ignore "$work/check.py" "$work" 2>/dev/null
