"""Operators for the CPU: blocks of rows in cache; backward passes keep inputs only."""
