"""The part of a model that is patched: all of it, or the language model of one that has towers."""

from collections.abc import Iterator
from typing import Any

from transformers.modeling_utils import PreTrainedModel


def patched_part(model: Any) -> tuple[str, Any]:
    """The part's name in the model, "" where it is the model, and the part.

    Raises:
        ValueError: the model is made of several, and none of them is its language model.
    """
    text = model.config.get_text_config()
    if text is model.config:
        return "", model
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(text):
            return name, module
    raise ValueError(
        f"{type(model).__name__} is made of several models, none of which has its {type(text).__name__}; load the one "
        "to patch by itself"
    )


def other_parts(model: Any) -> Iterator[str]:
    """Names of the models in a model that are not patched."""
    patched, _ = patched_part(model)
    if not patched:
        return
    for name, module in model.named_modules():
        apart = not f"{patched}.".startswith(f"{name}.") and not f"{name}.".startswith(f"{patched}.")
        if name and apart and isinstance(module, PreTrainedModel):
            yield name


def part_configs(model: Any) -> list[Any]:
    """The configs of the patched part: its own, and what the model's config has of it."""
    return [patched_part(model)[1].config, model.config.get_text_config()]
