"""motifarch's layers inside other people's models.

``patch`` puts differential attention and PolyNorm into a model that transformers loaded;
``load_patched`` loads what it saved afterwards. (After ``import motifarch`` the Auto classes do,
too.)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motifarch.integrations.patching import patch
    from motifarch.integrations.report import ModuleReport, PatchReport
    from motifarch.integrations.saving import load_patched

__all__ = ["ModuleReport", "PatchReport", "load_patched", "patch"]

# transformers' own import reaches into this package, for the patched models' config: too early for
# models.
_HOMES = {"patch": "patching", "load_patched": "saving", "ModuleReport": "report", "PatchReport": "report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
