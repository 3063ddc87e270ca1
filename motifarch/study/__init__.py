"""Studies: variants made equal, trained on the same data, measured, and reported with what the
figures can say.
"""
