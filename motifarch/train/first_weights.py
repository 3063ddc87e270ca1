"""A run's first weights from a checkpoint or a Hugging Face folder: every rank reads what it keeps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from motifarch.errors import UserError
from motifarch.parallel import own_part
from motifarch.train.checkpoint import mismatch
from motifarch.train.manifest import damage


def load_weights(folder: Path, model: nn.Module) -> None:
    """Replaces the weights of a model, sharded or not; a tensor is held whole at a time at most.

    Args:
        folder: A complete checkpoint's, or a Hugging Face folder with safetensors files.
        model: On its device already; its parameters' names are the folder's.

    Raises:
        UserError: The folder is missing, damaged, or does not fit the model.
    """
    if not folder.is_dir():
        raise UserError(f"run.init_from is {folder}, which is no folder; give a checkpoint's or a Hugging Face folder")
    weights: dict[str, Any] = get_model_state_dict(model)
    if not (folder / "config.json").exists():
        if reason := damage(folder):
            raise UserError(f"run.init_from is {folder}, which can't be used: {reason}")
        try:
            dcp.load({"model": weights}, checkpoint_id=str(folder))
        except (dcp.CheckpointException, ValueError, KeyError, RuntimeError) as error:
            raise UserError(mismatch(folder, error)) from None
        return
    missing = set(weights)
    try:
        for name, tensor in _tensors(folder):
            if name not in weights:
                raise ValueError(f"it has {name}, which the model has not")
            own = weights[name]
            if tensor.shape != own.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} there and {tuple(own.shape)} in the model")
            (own.to_local() if isinstance(own, DTensor) else own).copy_(own_part(tensor, own))
            missing.discard(name)
        # A tied matrix is in the folder once.
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if missing - tied:
            raise ValueError(f"it lacks {', '.join(sorted(missing - tied)[:3])}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"run.init_from is {folder}, whose weights don't fit the recipe's model: {reason}") from None


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                yield name, tensors.get_tensor(name)
