"""Times taken in turns, in one process: runs of a study are trained hours apart, beside other work.

Of several times the shortest counts: what else a machine does only ever adds.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch

from motifarch.data import DataShape
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.train.inputs import model_config
from motifarch.train.recipe import Recipe

CANDIDATES: tuple[Any, ...] = ("auto", "sdpa", "flash_attention_2")
"""Ours, as it chooses for itself, torch's, and flash-attn's where that is installed."""
_ROUNDS = 4


def fastest_attention(recipe: Recipe, sequences: DataShape, device: torch.device, compute: str, threads: int) -> str:
    """The attn_implementation with which a model of one layer trains fastest on a micro-batch: what
    differential attention is measured against takes the fastest there is on the machine.

    Args:
        recipe: of a run with softmax attention.
        sequences: length and vocabulary of its data.
        device: where it will train.
        compute: "float32" or "bfloat16".
        threads: of a CPU that a run takes.
    """
    model = dataclasses.replace(recipe.model, num_hidden_layers=1)
    recipes = {
        name: dataclasses.replace(recipe, model=dataclasses.replace(model, attn_implementation=name))
        for name in CANDIDATES
    }
    seconds = step_seconds(recipes, sequences, device, compute, threads)
    return min(seconds, key=lambda name: seconds[name])


def step_seconds(
    recipes: Mapping[str, Recipe], sequences: DataShape, device: torch.device, compute: str, threads: int
) -> dict[str, float]:
    """Seconds of a forward and a backward pass of a micro-batch, loss included, by name. What can't
    run here, for a library is missing or does not serve it, or memory ends, has none.
    """
    seconds: dict[str, float] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(_ROUNDS):
            for name, recipe in recipes.items():
                try:
                    took = _seconds(recipe, sequences, device, compute)
                except (ValueError, ImportError, UserError, torch.OutOfMemoryError):
                    continue
                seconds[name] = min(took, seconds.get(name, took))
    finally:
        torch.set_num_threads(before)
    return seconds


def _seconds(recipe: Recipe, sequences: DataShape, device: torch.device, compute: str) -> float:
    """Of the second pass of a new model: the first one warms up."""
    model = MotifForCausalLM(model_config(recipe, sequences)).train()
    model.to(device=device, dtype=getattr(torch, compute))  # type: ignore[call-arg]  # transformers hides its signature
    ids = torch.zeros(recipe.batch.micro_size, sequences.seq_len, dtype=torch.long, device=device)
    took = 0.0
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        _wait(device)
        took = time.perf_counter() - start
    return took


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
