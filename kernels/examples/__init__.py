"""Naive kernels that theory says are wrong somewhere: examples that must be found out."""
