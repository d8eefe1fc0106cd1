"""Triton kernels for GPUs. Nothing here is imported before a GPU's data arrives: Triton comes with PyTorch on Linux."""
