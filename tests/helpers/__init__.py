"""What several test modules share.

What is drawn:
- `strategies`: problems, and arrays for them in any memory layout;
- `illegal`: calls of the public functions, legal ones and those that break one rule.

What is right:
- `brute_force`: the definition in plain loops, which the oracle is tested against;
- `obvious`: the plain computation in the precision under test;
- `expected`: the oracle's results, and by what errors are measured;
- `accuracy`: the tolerance, and the check of a backend.

What is called:
- `calls`: the public functions on the arrays of any framework;
- `gpu_arrays`: arrays on a GPU, and backends on them;
- `imports`: what the modules of a package import.

Programs of their own: `small_shapes` and `lifetimes` for compute-sanitizer, and `dinat_client`.
"""
