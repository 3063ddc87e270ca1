"""Layers, models and pretraining for efficient attention architectures."""

__version__ = "0.2.0"
