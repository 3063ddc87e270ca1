"""`motifarch grow`: large models from small ones, computing the same function at the start.

A step of growth is a function from one :class:`Description` of a model to another: its config, and
for each tensor an :class:`Origin`, the tensors of the source folder that it is made of and how.
Steps read no weights; descriptions are cheap at any size and can be composed and checked before
anything is written. :func:`write` then makes the tensors one at a time.

    source = SourceFolder(path)
    wider = widen(describe(source), hidden=2, feed_forward=2, signal_heads=4)
    description = deepen(wider, layers=40)
    write(description, source, output)
"""

from motifarch.growth.depth import deepen
from motifarch.growth.description import Description, Origin, Step, describe
from motifarch.growth.folders import FolderWriter, SourceFolder
from motifarch.growth.grow import grow, write
from motifarch.growth.layouts import Factors, factors_to
from motifarch.growth.width import Noise, widen

__all__ = [
    "Description",
    "Factors",
    "FolderWriter",
    "Noise",
    "Origin",
    "SourceFolder",
    "Step",
    "deepen",
    "describe",
    "factors_to",
    "grow",
    "widen",
    "write",
]
