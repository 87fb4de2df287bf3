"""The public functions: validation, choice of a backend, allocation, launch, in that order."""
