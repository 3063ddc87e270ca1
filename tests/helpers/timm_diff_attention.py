"""timm's DiffAttention, an independent DIFF V1, without the rest of timm.

``import timm`` imports torchvision, which does not import beside a CPU build of torch. The layer
needs three sibling modules of pure PyTorch: the packages above it are bare names meanwhile.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import nn


def is_installed() -> bool:
    """Whether timm is there; looking for it imports nothing."""
    return importlib.util.find_spec("timm") is not None


def import_diff_attention() -> type[nn.Module]:
    """timm.layers.diff_attention.DiffAttention, leaving no half-imported timm behind."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "timm"}
    try:
        for name, folder in (("timm", root), ("timm.layers", root / "layers")):
            package = ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
        return importlib.import_module("timm.layers.diff_attention").DiffAttention
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "timm"]:
            del sys.modules[name]
        sys.modules.update(before)
