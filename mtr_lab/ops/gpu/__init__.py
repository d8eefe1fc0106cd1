"""The GPU implementations, Triton kernels. Importing them imports triton, which torch brings along on Linux only."""
