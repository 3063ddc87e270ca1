"""Layers, models and pretraining for efficient attention architectures.

Importing motifarch makes transformers' Auto classes know the Motif models, if and when transformers
is used.
"""

from motifarch._registration import register_when_needed

__version__ = "0.1.0"

register_when_needed()
