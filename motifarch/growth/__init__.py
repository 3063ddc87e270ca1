"""`motifarch grow`: large models from small ones, computing the same function at the start.

A step of growth is a function from one :class:`ModelSpec` of a model to another: its config, and
for each tensor a :class:`LazyTensor`, the tensors of the source folder that it is made of and how.
Steps read no weights; specs are cheap at any size and can be composed and checked before
anything is written. :func:`write` then makes the tensors one at a time.

    source = SourceFolder(path)
    wider = widen(describe(source), hidden=2, feed_forward=2, signal_heads=4)
    spec = deepen(wider, layers=40)
    write(spec, source, output)
"""

from motifarch.growth.depth import deepen
from motifarch.growth.experts import Experts, upcycle
from motifarch.growth.folders import FolderWriter, SourceFolder
from motifarch.growth.grow import grow, write
from motifarch.growth.hyper_connections import add_hyper_connections
from motifarch.growth.layouts import Factors, factors_to
from motifarch.growth.model_spec import LazyTensor, ModelSpec, Step, describe
from motifarch.growth.width import Noise, widen

# The names in 0.1.0, deprecated.
Description, Origin = ModelSpec, LazyTensor

__all__ = [
    "Description",
    "Experts",
    "Factors",
    "FolderWriter",
    "LazyTensor",
    "ModelSpec",
    "Noise",
    "Origin",
    "SourceFolder",
    "Step",
    "add_hyper_connections",
    "deepen",
    "describe",
    "factors_to",
    "grow",
    "upcycle",
    "widen",
    "write",
]
