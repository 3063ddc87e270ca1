"""What every process of a quick start needs, imported by the server that forks them."""

import motifarch.train.inputs
import motifarch.train.loop  # noqa: F401
