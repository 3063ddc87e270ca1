"""Data preparation and tokenizer training."""
