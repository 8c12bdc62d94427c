"""Kernels of our own, in Triton and through cuDNN."""
