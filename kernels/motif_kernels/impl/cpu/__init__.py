"""Operators written for the CPU: blocks of rows that stay in cache, and backward passes that keep
only their inputs.
"""
