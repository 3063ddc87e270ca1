"""Layers, models and pretraining for efficient attention architectures."""

__version__ = "0.1.0"
