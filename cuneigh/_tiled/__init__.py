"""Calls whose arrays lie in host memory, computed tile by tile on a GPU or the CPU.

- `cuneigh._shards.tiles`: how the layout is cut.
- `tasks`: the calls of all tiles, and what each takes.
- `boxes`: copies of boxes of tokens, also over the seam of a ring.
- `slots`: where tiles are computed, one after another on the CPU.
- `gpu`: two slots on a GPU, so that one computes while the host and the other copy.
- `computing`: all of it in order.
"""

from cuneigh._shards.tiles import TooLargeError
from cuneigh._tiled.computing import run
from cuneigh._tiled.tasks import Whole

__all__ = ["TooLargeError", "Whole", "run"]
