"""The Motif model family: grouped differential attention, DIFF V1, DIFF V2 or softmax attention, chosen by config."""

from .configuration_motif import MotifConfig
from .modeling_motif import MotifForCausalLM, MotifModel, MotifPreTrainedModel

__all__ = ["MotifConfig", "MotifForCausalLM", "MotifModel", "MotifPreTrainedModel"]
