"""A Motif model with another head than the language model's: transformers' own heads on it.

A causal language model's folder loads into these classes: the head, which it lacks, starts at
random, and transformers' report of the load says so.
"""

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from motifarch.models.motif.base_model import MotifPreTrainedModel


class MotifWithHead(MotifPreTrainedModel):
    """What these classes share."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    accepts_loss_kwargs = False
    """For Trainer: losses are means over a call's labels, to be divided among accumulated calls."""


class MotifForSequenceClassification(GenericForSequenceClassification, MotifWithHead):
    """``score`` of the last token that is not ``config.pad_token_id``: ``config.num_labels``
    numbers a row, as in reward models (one label).
    """

    new_head = "score"


class MotifForTokenClassification(GenericForTokenClassification, MotifWithHead):
    """``score`` of each token: ``config.num_labels`` numbers."""

    new_head = "score"


class MotifForQuestionAnswering(GenericForQuestionAnswering, MotifWithHead):
    """``qa_outputs`` of each token: how well an answer starts and ends there."""

    new_head = "qa_outputs"
