"""Measuring, as ``python -m cuneigh profile`` and the benchmarks do it: one piece of code for both.

- `cases`: problems from options and JSON files;
- `arrays`: the numbers that they are measured with, and what they look like as NumPy's;
- `checks`: results compared with float64 on a sample of tokens, before any time is told;
- `clock`: times, peaks of memory and ceilings, on a GPU or on the CPU;
- `ours`: the calls of cuneigh to measure; `peers`: those of other libraries;
- `provenance`: what a result says of where it comes from.

Nothing here is imported unless something is measured.
"""
