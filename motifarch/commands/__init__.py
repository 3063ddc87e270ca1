"""Command lines of functions that are a library's too. Help texts need no torch: a module here
imports what it runs after its options are read.
"""
