"""Launch tables: what is tried, and the script that measures it and writes
kernels/motif_kernels/tuning/.
"""
