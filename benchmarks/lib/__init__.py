"""What benchmarks share: timing, providers, cases, checks and reports."""
