"""Hugging Face model classes built from motifarch.layers.

Importing this package makes transformers' Auto classes know the Motif models.
"""

from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from motifarch.models.motif import (
    MODEL_TYPES,
    MotifConfig,
    MotifForCausalLM,
    MotifForQuestionAnswering,
    MotifForSequenceClassification,
    MotifForTokenClassification,
    MotifModel,
    register_attention,
)
from motifarch.transformers_names import add_to_transformers

__all__ = [
    "MODEL_TYPES",
    "MotifConfig",
    "MotifForCausalLM",
    "MotifForQuestionAnswering",
    "MotifForSequenceClassification",
    "MotifForTokenClassification",
    "MotifModel",
    "register_attention",
]

# Not AutoConfig.register, which takes a config class under its own model_type alone.
for _model_type in MODEL_TYPES:
    CONFIG_MAPPING.register(_model_type, MotifConfig, exist_ok=True)
AutoModel.register(MotifConfig, MotifModel, exist_ok=True)
AutoModelForCausalLM.register(MotifConfig, MotifForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MotifConfig, MotifForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MotifConfig, MotifForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(MotifConfig, MotifForQuestionAnswering, exist_ok=True)

add_to_transformers(MotifForCausalLM)
