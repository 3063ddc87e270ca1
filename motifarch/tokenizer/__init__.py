"""Tokenizers: loading, encoding, and training of vocabularies."""
