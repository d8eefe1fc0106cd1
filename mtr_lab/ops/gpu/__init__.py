"""Triton kernels for GPUs, imported when the first one runs: Triton comes with PyTorch on Linux alone."""
