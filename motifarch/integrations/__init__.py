"""motifarch's layers inside other people's models.

``patch`` puts differential attention and PolyNorm into a model that transformers loaded;
``load_patched`` loads what it saved afterwards. Importing this package makes transformers' Auto
classes know such folders, too.
"""

from motifarch.integrations.patching import patch
from motifarch.integrations.report import ModuleReport, PatchReport
from motifarch.integrations.saving import load_patched

__all__ = ["ModuleReport", "PatchReport", "load_patched", "patch"]
