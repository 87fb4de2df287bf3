"""The kernels for small windows, with what a block's rows attend to in shared memory at once."""
