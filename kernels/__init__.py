"""Triton kernels, one module a family, each under the contract that stands beside it."""
