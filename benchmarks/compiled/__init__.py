"""Kernels compiled for GPUs that are not there: what the compiler made of them, read and judged."""
