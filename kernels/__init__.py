"""Triton kernels of batch normalization: pointers, sizes and constants; no JAX."""
