"""Kernels for small windows, whose keys fit into shared memory at once."""
