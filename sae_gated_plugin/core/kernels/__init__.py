"""Triton kernels of the sparse core; they run on CUDA, or in Triton's interpreter."""
