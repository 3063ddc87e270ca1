"""The Motif model family: grouped differential attention, DIFF V1, DIFF V2 or softmax attention,
chosen by config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from motifarch.models.motif.configuration_motif import MotifConfig

if TYPE_CHECKING:
    from motifarch.models.motif.modeling_motif import MotifForCausalLM, MotifModel, MotifPreTrainedModel

__all__ = ["MotifConfig", "MotifForCausalLM", "MotifModel", "MotifPreTrainedModel"]


def __getattr__(name: str) -> Any:
    # The config is registered while transformers' Auto modules are still being imported, and the
    # model classes build on modules that import those in turn: they wait until somebody asks for
    # them.
    if name in __all__:
        from motifarch.models.motif import modeling_motif

        return getattr(modeling_motif, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
