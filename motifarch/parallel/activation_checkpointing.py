"""What of a model's activations is kept for the backward pass, and what is computed again."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from motifarch.decoder_layers import decoder_layers
from motifarch.errors import UserError

Recompute = Literal["none", "full", "selective"] | int
"""`full`: all layers; `selective`: all but matrix products and attention; n: each n-th layer."""


def check_activation_checkpointing(recompute: Recompute) -> None:
    """Refuses what is no choice, with a UserError that names the choices."""
    if recompute not in ("none", "full", "selective") and not (isinstance(recompute, int) and recompute >= 1):
        raise UserError(
            f"activation_checkpointing is {recompute!r}; accepted are none, full, selective, or a number n: every n-th "
            "decoder layer"
        )


def _kept() -> set[Any]:
    """Operators whose results are dear to compute again for the memory they take."""
    names = [("aten", "mm"), ("aten", "addmm"), ("aten", "bmm"), ("aten", "_scaled_mm"), ("motif", "diff_attention")]
    names += [("motif", "grouped_product"), ("motif", "blocked_attention"), ("motif", "segmented_attention")]
    names += [("aten", "_scaled_dot_product_flash_attention_for_cpu"), ("aten", "_scaled_dot_product_flash_attention")]
    names += [("aten", "_scaled_dot_product_efficient_attention"), ("aten", "_scaled_dot_product_cudnn_attention")]
    kept = set()
    for namespace, name in names:
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            kept.add(packet.default)
    return kept


def _policy(kept: set[Any], context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Replay(TorchDispatchMode):
    """A recomputation's mode, which takes what was kept out of its storage, for that alone.

    It counts every operator otherwise, and FSDP may have to gather experts within a layer when it
    is recomputed, but not before.
    """

    def __init__(self, mode: Any, kept: set[Any]) -> None:
        super().__init__()
        self._mode, self._kept = mode, kept

    def __enter__(self) -> "_Replay":
        getattr(self._mode, "func_counter", {}).clear()  # of torch 2.13: it counts over all passes
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._kept:
            return func(*args, **(kwargs or {}))
        return self._mode.__torch_dispatch__(func, types, args, kwargs)


def _selective(kept: set[Any]) -> tuple[Any, Any]:
    forward, recomputation = create_selective_checkpoint_contexts(partial(_policy, kept))
    return forward, _Replay(recomputation, kept)


def apply_activation_checkpointing(model: nn.Module, recompute: Recompute) -> None:
    """Lets decoder layers be computed again in the backward pass, in place.

    They must be transformers' GradientCheckpointingLayers.

    Raises:
        UserError: `recompute` is no choice.
    """
    check_activation_checkpointing(recompute)
    if recompute == "none":
        return
    every = recompute if isinstance(recompute, int) else 1
    for i, layer in enumerate(decoder_layers(model)):
        if i % every:
            continue
        # Only what draws at random must draw the same again.
        draws = any(isinstance(module, nn.Dropout) or hasattr(module, "router_noise") for module in layer.modules())
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
        if recompute == "selective":
            options["context_fn"] = partial(_selective, _kept())
        # transformers' own switch of its GradientCheckpointingLayer, one layer at a time.
        layer._gradient_checkpointing_func = partial(checkpoint, **options)  # type: ignore[assignment]
        layer.gradient_checkpointing = True  # type: ignore[assignment]
