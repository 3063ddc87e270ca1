"""Makes transformers' Auto classes know the Motif models, without importing transformers before somebody needs it.

``import motifarch.layers`` runs ``motifarch/__init__.py`` first, and layers must not pull in transformers. So
registration
waits: the config class is registered right after transformers' Auto configs are imported (or at once if they were), and
the model classes when the first MotifConfig is made, which every way to a model goes through.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO_CONFIGS = "transformers.models.auto.configuration_auto"

# Folders of the released models say "Motif"; "motif" is accepted as well.
_MODEL_TYPES = ("Motif", "motif")


def _register_config(auto_configs: ModuleType) -> None:
    from .models.motif.configuration_motif import MotifConfig

    for model_type in _MODEL_TYPES:
        auto_configs.CONFIG_MAPPING.register(model_type, MotifConfig, exist_ok=True)


@functools.cache
def register_models() -> None:
    """Put the model classes behind AutoModel and AutoModelForCausalLM."""
    from transformers import AutoModel, AutoModelForCausalLM

    from .models.motif.configuration_motif import MotifConfig
    from .models.motif.modeling_motif import MotifForCausalLM, MotifModel

    AutoModel.register(MotifConfig, MotifModel, exist_ok=True)
    AutoModelForCausalLM.register(MotifConfig, MotifForCausalLM, exist_ok=True)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the Auto configs be imported as always, then registers."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AUTO_CONFIGS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_config(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_needed() -> None:
    """Register now if transformers' Auto configs are loaded, else as soon as they are."""
    if _AUTO_CONFIGS in sys.modules:
        _register_config(sys.modules[_AUTO_CONFIGS])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
