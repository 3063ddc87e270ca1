"""A trained model, whole, from a checkpoint alone."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from motifarch.errors import UserError, first_line
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.train.checkpoint import load_model_state
from motifarch.train.lora import add_adapters, merge_adapters
from motifarch.train.manifest import MANIFEST, damage, read_manifest
from motifarch.train.recipe import LoraSection


def read_about(checkpoint: Path) -> dict[str, Any]:
    """What the run noted in a checkpoint's manifest: its model's config, its data and more.

    Raises:
        UserError: the checkpoint is incomplete or damaged (its manifest and sizes alone are looked
            at), or no run has made it.
    """
    if reason := damage(checkpoint, hashes=False):
        raise UserError(f"the checkpoint {checkpoint} can't be used: {reason}")
    about: dict[str, Any] = read_manifest(checkpoint)["about"]
    if not about:
        raise UserError(f"the checkpoint {checkpoint} does not say of what run it is; its weights alone can be read")
    return about


def load_trained_model(checkpoint: Path, *, merge: bool = True) -> MotifForCausalLM:
    """The model with its weights in float32, from the config in the manifest, whose hash covers it.

    The adapters of a run that trained some become part of the weights, unless ``merge`` is False.

    Raises:
        UserError: as `motifarch.train.checkpoint.load_model_state`, or the config is no model's.
    """
    about = read_about(checkpoint)
    fields, lora = about["model_config"], about.get("lora")
    if "mhc_h_post_alpha" in about:  # what the weights were trained with up to there
        fields = fields | {"mhc_h_post_alpha_end": about["mhc_h_post_alpha"]}
    try:
        model = MotifForCausalLM(MotifConfig(**fields))
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = f"the model_config in its {MANIFEST} is no model's ({first_line(error)})"
        raise UserError(f"the checkpoint {checkpoint} can't be used: {reason}") from None
    if lora:
        add_adapters(model, LoraSection(**lora))
    load_model_state(checkpoint, model)
    if lora and merge:
        merge_adapters(model)
    return model
