"""Softmax attention is what differential attention is measured against: it takes the fastest there
is on the machine.
"""

import dataclasses
import time

import torch

from motifarch.data import DataShape
from motifarch.models.motif import MotifModel
from motifarch.train.inputs import model_config
from motifarch.train.recipe import Recipe

CANDIDATES = ("auto", "sdpa", "flash_attention_2")
"""Ours, as it chooses for itself, torch's, and flash-attn's where that is installed."""
_REPEATS = 5


def fastest_attention(recipe: Recipe, sequences: DataShape, device: torch.device, compute: str) -> str:
    """The attn_implementation with which a decoder layer trains fastest on a micro-batch.

    Times are the shortest of several, taken in turns: what else a machine does only ever adds.

    Args:
        recipe: of a run with softmax attention.
        sequences: length and vocabulary of its data.
        device: where it will train.
        compute: "float32" or "bfloat16".
    """
    one_layer = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=1))
    model = MotifModel(model_config(one_layer, sequences))
    model.to(device=device, dtype=getattr(torch, compute))  # type: ignore[call-arg]  # transformers hides its signature
    ids = torch.zeros(recipe.batch.micro_size, sequences.seq_len, dtype=torch.long, device=device)
    seconds: dict[str, float] = {}
    for _ in range(1 + _REPEATS):  # the first warms up and decides nothing unless it is the best
        for name in CANDIDATES:
            try:
                model.set_attn_implementation(name)
                took = _seconds(model, ids)
            except (ValueError, ImportError):  # not installed, or it does not serve such heads
                continue
            seconds[name] = min(took, seconds.get(name, took))
    return min(seconds, key=lambda name: seconds[name])


def _seconds(model: MotifModel, ids: torch.Tensor) -> float:
    """Of a forward and a backward pass."""
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    start = time.perf_counter()
    model(ids, use_cache=False).last_hidden_state.sum().backward()
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start
