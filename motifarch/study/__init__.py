"""Studies: variants made equal, trained on the same data, measured and reported."""
