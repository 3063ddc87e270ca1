"""Benchmarks of kernels, each an entry point: attention, decode, poly_norm, grouped_poly_norm,
combine.
"""
