"""What of a model's activations is kept for the backward pass, and what is computed again."""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from motifarch.decoder_layers import decoder_layers
from motifarch.errors import UserError
from motifarch.layers.recorded import Recording

Recompute = Literal["none", "full", "selective"] | int
"""`full`: all layers; `selective`: all but matrix products and attention; n: each n-th layer. In
any case tokens go to the experts that they went to at first."""


def check_activation_checkpointing(recompute: Recompute) -> None:
    """Refuses what is no choice, with a UserError that names the choices."""
    if recompute not in ("none", "full", "selective") and not (isinstance(recompute, int) and recompute >= 1):
        raise UserError(
            f"activation_checkpointing is {recompute!r}; accepted are none, full, selective, or a number n: every n-th "
            "decoder layer"
        )


@cache
def _kept() -> frozenset[Any]:
    """Operators whose results are dear to compute again for the memory they take.

    Not aten.bmm: hyper-connections mix their streams with it, and those in float32 are as large as
    all that is kept else. Nor all-to-alls: a dispatched token is sent once more, for it takes as
    much memory as both products of its experts together.
    """
    names = [("aten", "mm"), ("aten", "addmm"), ("aten", "_scaled_mm"), ("motif", "diff_attention")]
    names += [("motif", "grouped_product"), ("motif", "blocked_attention"), ("motif", "segmented_attention")]
    names += [("aten", "_scaled_dot_product_flash_attention_for_cpu"), ("aten", "_scaled_dot_product_flash_attention")]
    names += [("aten", "_scaled_dot_product_efficient_attention"), ("aten", "_scaled_dot_product_cudnn_attention")]
    packets = (getattr(getattr(torch.ops, namespace), name, None) for namespace, name in names)
    return frozenset(packet.default for packet in packets if packet is not None)


@cache
def _recorded() -> frozenset[Any]:
    return frozenset(getattr(torch.ops.motifarch, name).default for name in ("select_experts", "sort_by_expert"))


class _Keep(TorchDispatchMode):
    """Keeps some operators' results, in order; in a repetition gives them back.

    torch's own modes of selective checkpointing want all operators of both passes to be the same.
    Those of FSDP2, which gathers parts of a layer on the way, are not.
    """

    supports_higher_order_operators = True  # compiled code has some

    def __init__(self, results: dict[Any, deque[Any]], *, give_back: bool) -> None:
        super().__init__()
        self._results, self._give_back = results, give_back

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as it is."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _kept():
            return func(*args, **(kwargs or {}))
        if self._give_back:
            return self._results[func].popleft()
        out = func(*args, **(kwargs or {}))
        self._results[func].append(tree_map_only(Tensor, Tensor.detach, out))
        return out


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


def _contexts(*, selective: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around a layer's forward pass, and around its repetition."""
    if torch.compiler.is_compiling():
        # What is recorded else, the graph keeps.
        kept = [*(_kept() if selective else ()), *_recorded()]
        return create_selective_checkpoint_contexts(kept)  # type: ignore[no-any-return, no-untyped-call]
    recording = Recording()
    record, replay = recording.record(), recording.replay()
    if not selective:
        return record, replay
    results: dict[Any, deque[Any]] = defaultdict(deque)
    return _both(record, _Keep(results, give_back=False)), _both(replay, _Keep(results, give_back=True))


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
        options["context_fn"] = partial(_contexts, selective=recompute == "selective")
        # transformers' own switch of its GradientCheckpointingLayer, one layer at a time.
        layer._gradient_checkpointing_func = partial(checkpoint, **options)  # type: ignore[assignment]
        layer.gradient_checkpointing = True  # type: ignore[assignment]
