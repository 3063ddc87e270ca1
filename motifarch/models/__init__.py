"""Hugging Face model classes built from motifarch.layers."""
