"""The Motif models: GDA, DIFF V1, DIFF V2 or softmax attention, chosen by config."""

from motifarch.models.motif.base_model import MotifModel, MotifPreTrainedModel
from motifarch.models.motif.configuration_motif import MODEL_TYPES, MotifConfig
from motifarch.models.motif.heads import (
    MotifForQuestionAnswering,
    MotifForSequenceClassification,
    MotifForTokenClassification,
)
from motifarch.models.motif.modeling_motif import MotifForCausalLM
from motifarch.models.motif.own_attention import register_attention

__all__ = [
    "MODEL_TYPES",
    "MotifConfig",
    "MotifForCausalLM",
    "MotifForQuestionAnswering",
    "MotifForSequenceClassification",
    "MotifForTokenClassification",
    "MotifModel",
    "MotifPreTrainedModel",
    "register_attention",
]
