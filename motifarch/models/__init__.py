"""Hugging Face model classes built from motifarch.layers.

Importing this package makes transformers' Auto classes know the Motif models.
"""

import transformers
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
)

# Not AutoConfig.register, which takes a config class under its own model_type alone.
for _model_type in MODEL_TYPES:
    CONFIG_MAPPING.register(_model_type, MotifConfig, exist_ok=True)
AutoModel.register(MotifConfig, MotifModel, exist_ok=True)
AutoModelForCausalLM.register(MotifConfig, MotifForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MotifConfig, MotifForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MotifConfig, MotifForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(MotifConfig, MotifForQuestionAnswering, exist_ok=True)

# `transformers serve` looks an architecture's class up among transformers' own. That module exists
# twice, for transformers imports itself anew to make docstrings; both are of one class.
if type(transformers).__module__.startswith("transformers."):
    type(transformers).MotifForCausalLM = MotifForCausalLM  # type: ignore[attr-defined]
