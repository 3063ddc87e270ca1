"""A Motif model with another head than the language model's: transformers' own heads on it.

A causal language model's folder loads into these classes: the head, which it lacks, starts at
random, and transformers' report of the load says so.
"""

import copy
from typing import Any

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from motifarch.models.motif.base_model import MotifPreTrainedModel
from motifarch.models.motif.configuration_motif import MotifConfig


class MotifWithHead(MotifPreTrainedModel):
    """What these classes share."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$", r"^model\.mtp_layers\."]

    accepts_loss_kwargs = False
    """For Trainer: losses are means over a call's labels, to be divided among accumulated calls."""


class WithoutMTP:
    """Goes before transformers' class: these heads predict no tokens, so a layer for multi-token
    prediction would be parameters without a gradient, which stop DDP.
    """

    def __init__(self, config: MotifConfig, *arguments: Any, **options: Any) -> None:
        if config.num_nextn_predict_layers:
            config = copy.deepcopy(config)
            config.num_nextn_predict_layers = 0
        parent: Any = super()
        parent.__init__(config, *arguments, **options)


class MotifForSequenceClassification(WithoutMTP, GenericForSequenceClassification, MotifWithHead):
    """``score`` of the last token that is not ``config.pad_token_id``: ``config.num_labels``
    numbers a row, as in reward models (one label).
    """

    new_head = "score"


class MotifForTokenClassification(WithoutMTP, GenericForTokenClassification, MotifWithHead):
    """``score`` of each token: ``config.num_labels`` numbers."""

    new_head = "score"


class MotifForQuestionAnswering(WithoutMTP, GenericForQuestionAnswering, MotifWithHead):
    """``qa_outputs`` of each token: how well an answer starts and ends there."""

    new_head = "qa_outputs"
