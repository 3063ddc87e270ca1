"""Attention through flash-attn 4 or 2."""
