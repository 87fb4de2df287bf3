"""The adapter of JAX: its arrays, the custom call that JAX compiles, and what XLA runs for it."""

from cuneigh._frameworks.jax import derivatives, handlers
from cuneigh._frameworks.jax.adapter import ADAPTER

__all__ = ["ADAPTER"]

derivatives.register()
handlers.register()
