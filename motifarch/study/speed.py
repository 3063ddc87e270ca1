"""How fast a run trained, and how fast its model generates and what a token costs in its cache."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from motifarch.counted import counted
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM

# The prompt goes through the model so many tokens at a time: eager attention maps of a long one
# would fill the memory.
_PROMPT_PART = 256


def training_speed(rows: Sequence[Mapping[str, Any]], *, warmup: float = 0.1) -> dict[str, float | int]:
    """Speed and memory of a run's training steps; validation and saving are not in the times.

    Args:
        rows: the run's metrics, from :func:`motifarch.train.metrics.read_metrics`.
        warmup: the share of steps at the start that is left out, at least one.

    Returns:
        train_tokens_per_s and model_tflops, medians over the steps that are left; and
        peak_memory_bytes over all: on a GPU the allocator's, on a CPU the largest resident set of
        the process.

    Raises:
        UserError: there are fewer than two steps.
    """
    if len(rows) < 2:
        raise UserError(
            f"the run's metrics hold {counted(len(rows), 'step')}; its speed takes at least 2: train it for longer"
        )
    warm = rows[max(1, int(warmup * len(rows))) :]
    return {
        "train_tokens_per_s": statistics.median(row["tokens_per_second"] for row in warm),
        "model_tflops": statistics.median(row["model_tflops"] for row in warm),
        "peak_memory_bytes": round(max(row["memory_gib"] for row in rows) * 2**30),
    }


def decoding_speed(
    model: MotifForCausalLM, ids: Tensor, *, new_tokens: int = 64, repeats: int = 5
) -> dict[str, float | int]:
    """Speed of ``model.generate`` after a prompt that is in the cache already, and what the cache
    takes.

    Args:
        model: in evaluation mode.
        ids: (B, prompt + 1), for generate always has a token to begin with: the last is not cached
            beforehand.
        new_tokens: made for each row, greedily.
        repeats: timed calls; one before them is not counted.

    Returns:
        decode_tokens_per_s, of all rows together, the median of the repeats; prefill_tokens; and
        kv_bytes_per_token, the bytes of a row's keys and values over its tokens, all layers
        together. (A sliding window keeps the last tokens only, and so costs less for each of a
        longer prompt.)
    """
    anything: Any = model  # transformers types generate for a protocol that no model is known to follow
    rates = []
    for _ in range(repeats + 1):
        cache = fill_cache(model, ids[:, :-1])
        bytes_per_token = kv_bytes_per_token(cache, ids[:, :-1].numel())
        started = _now(model.device)
        out = anything.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            disable_compile=True,
        )
        seconds = _now(model.device) - started
        rates.append((out.numel() - ids.numel()) / seconds)
    return {
        "decode_tokens_per_s": statistics.median(rates[1:]),
        "prefill_tokens": ids.shape[1] - 1,
        "kv_bytes_per_token": bytes_per_token,
    }


@torch.no_grad()
def fill_cache(model: MotifForCausalLM, ids: Tensor) -> DynamicCache:
    """A cache that holds ``ids``, (B, S)."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(_PROMPT_PART, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def kv_bytes_per_token(cache: DynamicCache, tokens: int) -> int:
    """Bytes of all keys and values that a cache has allocated for each token; a layer that does not
    use it has none.
    """
    layers: list[Any] = cache.layers
    return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values) if t is not None) // tokens


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
