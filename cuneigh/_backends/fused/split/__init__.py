"""The kernels for few queries of one axis, whose keys are the work of several blocks."""
