"""Benchmarks of kernels, each an entry point: attention, decode, poly_norm, combine."""
