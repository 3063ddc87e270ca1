"""timm's DiffAttention, an independent DIFF V1, and its Attention, without the rest of timm.

``import timm`` imports torchvision, which does not import beside a CPU build of torch. The layers
need some sibling modules of pure PyTorch: the packages above them are bare names meanwhile.
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
    """timm.layers.diff_attention.DiffAttention."""
    return _import("diff_attention").DiffAttention


def import_attention() -> type[nn.Module]:
    """timm.layers.attention.Attention."""
    return _import("attention").Attention


def _import(name: str) -> ModuleType:
    """A module of timm.layers, leaving no half-imported timm behind."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "timm"}
    try:
        for package_name, folder in (("timm", root), ("timm.layers", root / "layers")):
            package = ModuleType(package_name)
            package.__path__ = [str(folder)]
            sys.modules[package_name] = package
        return importlib.import_module(f"timm.layers.{name}")
    finally:
        for imported in [n for n in sys.modules if n.split(".")[0] == "timm"]:
            del sys.modules[imported]
        sys.modules.update(before)
