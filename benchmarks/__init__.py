"""Benchmarks: each script measures on one machine, prints a table and writes JSON."""
