"""A run's first weights, from a checkpoint or a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from motifarch.checkpoint_reader import CheckpointReader
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig
from motifarch.shards import local_shard, to_local
from motifarch.train.finite import first_nonfinite
from motifarch.train.lora import base_weights
from motifarch.train.manifest import damage, read_manifest
from motifarch.weight_files import WeightFiles


def load_weights(folder: Path, model: nn.Module) -> None:
    """Replaces the weights of a model, sharded or not; a tensor is held whole at a time at most.

    Args:
        folder: a complete checkpoint's, or a Hugging Face folder with safetensors files.
        model: on its device already; its parameters' names are the folder's, adapters apart, which
            stay as they are.

    Raises:
        UserError: the folder is missing, damaged or not finite, or does not fit the model.
    """
    if not folder.is_dir():
        raise UserError(f"run.init_from is {folder}, which is no folder; give a checkpoint's or a Hugging Face folder")
    weights = base_weights(get_model_state_dict(model))
    if (folder / "config.json").exists():
        _load_files(folder, model, weights)
    elif reason := damage(folder):
        raise UserError(f"run.init_from is {folder}, which can't be used: {reason}")
    elif read_manifest(folder)["about"].get("lora"):
        raise UserError(
            f"run.init_from is {folder}, a checkpoint with adapters; make them part of the weights with `motifarch "
            "export`, and begin with the folder that it writes"
        )
    else:
        CheckpointReader(folder).load({"model": weights})
    if bad := first_nonfinite(weights, dist.group.WORLD):
        raise UserError(f"run.init_from is {folder}, whose {bad} is not finite; begin with other weights")


def _load_files(folder: Path, model: nn.Module, weights: dict[str, Any]) -> None:
    missing = set(weights)
    try:
        files = WeightFiles(folder)
        for name in files.names:
            if name not in weights:
                raise ValueError(f"it has {name}, which the model has not")
            tensor, own = files.read(name), weights[name]
            if tensor.shape != own.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} there and {tuple(own.shape)} in the model")
            to_local(own).copy_(local_shard(tensor, own))
            missing.discard(name)
        # A tied matrix is in the folder once.
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if missing - tied:
            raise ValueError(f"it lacks {', '.join(sorted(missing - tied)[:3])}")
    except ValueError as error:
        raise UserError(f"run.init_from is {folder}, whose weights don't fit the recipe's model: {error}") from None


def config_differences(folder: Path, config: MotifConfig) -> list[str]:
    """What a model computes otherwise than the recipe's, though its shapes may be the same.

    Known only of a Motif model's Hugging Face folder. Gives a line for each field; a change may be
    meant, as a longer context's rope_theta is.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        theirs = MotifConfig.from_dict(fields) if fields["model_type"].lower() == "motif" else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    pairs = [(name, getattr(theirs, name), getattr(config, name)) for name in _SHAPELESS] if theirs else []
    return [
        f"run.init_from is {folder}, whose model has {name} {was!r}, but the recipe's {now!r}: it computes another "
        "function, unless that is meant, set the model section to the same"
        for name, was, now in pairs
        if was != now
    ]


# Fields that decide what a model computes, but no tensor's shape.
_SHAPELESS = (
    "attention_type",
    "noise_heads",
    "lambda_init",
    "lambda_init_depth_offset",
    "hidden_act",
    "poly_norm_eps",
    "rms_norm_eps",
    "attn_rms_norm_eps",
    "rope_parameters",
    "windows",
    "swa_rope_theta",
    "experts_top_k",
    "route_norm",
    "route_scale",
    "polynorm_sigmoid_weight",
    "polynorm_output_scale",
    "polynorm_bias_clamp",
    "hidden_clamp",
    "mhc_sinkhorn_iters",
    "qk_rope_head_dim",
    "mhc_h_post_alpha_end",
)
