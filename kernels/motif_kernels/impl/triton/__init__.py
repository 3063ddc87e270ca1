"""Triton kernels, one family a file. Nothing outside this folder imports triton.

Each file has the kernels and, below them, functions that launch them on plain tensors. The
functions of a family have the names and arguments of its CPU counterpart in ``cpu/``; the operators
in ``ops/`` call one or the other.
"""
