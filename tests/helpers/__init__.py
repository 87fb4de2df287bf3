"""What several test modules share.

What is drawn:
- `emulated`: kernels on the host; `part_problems`: borders, parts and masks for few kernels;
- `strategies`: problems, and arrays for them in any memory layout;
- `illegal`: calls of the public functions, legal ones and those that break one rule.

What is right:
- `brute_force`: the definition in plain loops, which the oracle is tested against;
- `obvious`: the plain computation in the precision under test;
- `expected`: the oracle's results, and by what errors are measured;
- `accuracy`: the tolerance, and the check of a backend.

What is called:
- `calls`: the public functions on the arrays of any framework;
- `speaker`: arrays that have nothing but the protocols;
- `tensors`: PyTorch's functions and the gradients that they have;
- `gpu_arrays`: arrays on a GPU, and backends on them;
- `toy_backend`, `toy_kernel`, `toy_installation`: the least that a backend and a kernel can be.

- `hopper`: problems and plans of one backend.

What is looked at:
- `imports`: what the modules of a package import;
- `cubin`: what a compiled kernel says of its parameters.

Programs of their own: `small_shapes` and `lifetimes` for compute-sanitizer, `soak`, `older_nvrtc`
and `dinat_client`.
"""
