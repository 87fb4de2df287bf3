"""JAX: the functions of `cuneigh` take its arrays as they are; `distributed` has some for shards.

Every call is a custom call of XLA, whether it is made eagerly or within a function that JAX traces:
``jax.jit``, ``jax.grad``, ``jax.vmap`` and what is made of them pass through it, XLA provides all
memory, and on a GPU kernels run on XLA's stream. A program that was exported with such calls needs
their handlers, which XLA knows once `cuneigh` and JAX are imported, in either order. Arrays may
be sharded over their batch and heads: nothing is gathered then, and over explicit axes of a mesh
results are typed alike. For token axes that are cut there is `cuneigh.jax.distributed`.
"""

import cuneigh._frameworks.jax  # noqa: F401 - registers the handlers
