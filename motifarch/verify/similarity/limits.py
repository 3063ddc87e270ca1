"""Above what a likeness is an alarm, and what that was seen to do."""

import math
from dataclasses import dataclass

_NARROW = 6.0
"""Standard deviations of chance's correlation: of few channels it is large by itself."""


@dataclass(frozen=True)
class Limits:
    """One for all ways to align channels."""

    layers: float
    """Of the most alike layer's score."""
    anchor: float
    """Of the embeddings' correlation on rows that were held out."""

    def of_layers(self, channels: int) -> float:
        """The limit where so many channels are compared."""
        return max(self.layers, _NARROW / math.sqrt(channels * (channels - 1) / 2))


LIMITS = Limits(layers=0.25, anchor=0.25)
"""Between what independent models reach and what fine-tuned copies do: see
benchmarks/results/similarity.json, by `python -m benchmarks.verify.similarity`."""

CALIBRATION = (
    "Limits were set on small models (width 64, two layers), trained alike from independent seeds on one text: of "
    "1,000 pairs among 400 models, 200 of which share none, the most alike came to 0.06, none to an alarm. What was "
    "made of them by copying, fine-tuning, merging and disguising was found each time (200 of 200 of each kind), also "
    "with embeddings replaced. Larger models were not measured."
)
"""What is to be known of that, for a report."""
