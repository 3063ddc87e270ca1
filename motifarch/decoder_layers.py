"""The layers of a language model that are handled one by one: sharded, recomputed, compiled."""

from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in `model.model.layers` and, where a model has them, those of multi-token
    prediction in `model.model.mtp_layers`. Each has its attention as `self_attn`.
    """
    return [*model.model.layers, *getattr(model.model, "mtp_layers", ())]  # type: ignore[misc, union-attr]
