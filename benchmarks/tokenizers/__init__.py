"""Benchmarks of tokenizers: what they make of text, and what models make of them."""
