"""Benchmarks: each script measures in one run on one machine, prints a table, and writes JSON and a
picture.
"""
