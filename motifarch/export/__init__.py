"""Checkpoints become Hugging Face folders, with a card and a chat template, and go to a hub."""

from motifarch.export.checkpoint import export

__all__ = ["export"]
