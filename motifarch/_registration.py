"""Makes transformers' Auto classes know the Motif models, without importing transformers before
somebody needs it.

``import motifarch.layers`` runs ``motifarch/__init__.py`` first, and layers must not pull in
transformers. So registration waits: the config class is registered right after transformers' Auto
configs are imported (or at once if they were), and the model classes when the first MotifConfig is
made, which every way to a model goes through.
"""

from __future__ import annotations

import functools
from types import ModuleType

from motif_kernels.after_import import after_import

_AUTO_CONFIGS = "transformers.models.auto.configuration_auto"

# Folders of the released models say "Motif"; "motif" is accepted as well.
MODEL_TYPES = ("Motif", "motif")


def _register_config(auto_configs: ModuleType) -> None:
    from motifarch.integrations.configuration import MODEL_TYPE, PatchedConfig
    from motifarch.models.motif.configuration_motif import MotifConfig

    for model_type in MODEL_TYPES:
        auto_configs.CONFIG_MAPPING.register(model_type, MotifConfig, exist_ok=True)
    auto_configs.CONFIG_MAPPING.register(MODEL_TYPE, PatchedConfig, exist_ok=True)


@functools.cache
def register_models() -> None:
    """Put the model classes behind AutoModel and AutoModelForCausalLM."""
    from transformers import AutoModel, AutoModelForCausalLM

    from motifarch.models.motif.configuration_motif import MotifConfig
    from motifarch.models.motif.modeling_motif import MotifForCausalLM, MotifModel

    AutoModel.register(MotifConfig, MotifModel, exist_ok=True)
    AutoModelForCausalLM.register(MotifConfig, MotifForCausalLM, exist_ok=True)


def register_when_needed() -> None:
    """Register now if transformers' Auto configs are loaded, else as soon as they are."""
    after_import(_AUTO_CONFIGS, _register_config)
