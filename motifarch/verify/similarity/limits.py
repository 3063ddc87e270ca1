"""Above what a likeness is an alarm, and what that was seen to do."""

from dataclasses import dataclass

from motifarch.verify.similarity.alignment import How


@dataclass(frozen=True)
class Limit:
    """For one way to align channels."""

    layers: float
    """Of the most alike layer's score."""
    anchor: float
    """Of the embeddings' correlation on rows that were held out."""


LIMITS: dict[How, Limit] = {
    "as they lie": Limit(0.25, 0.25),
    "permuted": Limit(0.25, 0.25),
    "rotated": Limit(0.25, 0.25),
    "by their norms": Limit(0.25, 0.25),
}
"""Between what independent models reach and what fine-tuned copies do: see
benchmarks/results/similarity.json, by `python -m benchmarks.verify.similarity`."""

CALIBRATION = "TODO"
