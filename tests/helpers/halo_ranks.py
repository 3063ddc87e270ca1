"""Layers with a window on ranks that hold parts of a row, against the same on one process:
functions that ranks run.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from motifarch.layers import (
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    GroupedDifferentialLatentAttention,
    RotaryEmbedding,
    SoftmaxAttention,
)
from motifarch.layers.base_attention import BaseAttention

WIDTH = 10
_LATENT: dict[str, Any] = {"head_dim": 7, "qk_rope_head_dim": 2, "v_head_dim": 4, "q_lora_rank": 6, "kv_lora_rank": 5}
_LAYERS: dict[str, tuple[type[BaseAttention], dict[str, Any]]] = {
    "softmax": (SoftmaxAttention, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}),
    "gda": (GroupedDifferentialAttention, {"num_heads": 3, "num_noise_heads": 1, "num_kv_heads": 2, "head_dim": 6}),
    "diff_v2": (
        DifferentialAttentionV2,
        {"num_heads": 3, "num_noise_heads": 1, "num_kv_heads": 1, "head_dim": 6, "gate": True},
    ),
    "gdla": (GroupedDifferentialLatentAttention, {"num_heads": 10, "ratio": 4} | _LATENT),
}
NUMBERS = {"softmax": 2 * (6 + 6), "gda": 2 * 6 + 12, "diff_v2": 6 + 6, "gdla": 5 + 2}
"""What a token's keys and values are on their way; GDLA's own are 2 x (7 + 4)."""


def build(name: str, left: int) -> BaseAttention:
    """A layer with a window, in float64."""
    torch.manual_seed(0)
    kind, options = _LAYERS[name]
    return kind(WIDTH, window_size=(left, 0), layer_idx=0, **options).double()  # type: ignore[arg-type]


def documents(ranks: int, seed: int) -> Iterator[tuple[int, int, list[int] | None]]:
    """Tokens of a rank, the window's left side and the bounds of a row's documents (None: a batch
    of two rows): those that are easily got wrong, and random ones.
    """
    total = ranks * 8
    for left in (3, 8, 11, total + 5):
        yield 8, left, [0, total]  # one document over all ranks
        yield 8, left, list(range(0, total + 1, 8))  # borders of documents and ranks alike
        yield 8, left, [0, 6, 10, total]  # one ends in the halo, one begins there
        yield 8, left, [0, 7, 8, 9, 9, total]  # of one token, at a rank's border, and empty
        yield 8, left, list(range(0, total + 1, 2))  # all shorter than the window
        yield 8, left, None
    yield 8, 0, [0, total]  # a token sees itself alone
    draw = random.Random(seed)
    for _ in range(12):
        tokens = draw.randint(1, 9)
        inner = sorted(draw.randint(0, ranks * tokens) for _ in range(draw.randint(0, 6)))
        yield tokens, draw.randint(0, ranks * tokens), [0, *inner, ranks * tokens]


def _attend(layer: BaseAttention, x: Tensor, grad: Tensor, bounds: list[int] | None, part: slice) -> Tensor:
    """The output of some of a row's tokens; gradients are left in x and the layer."""
    total = grad.shape[1]
    starts = torch.tensor(bounds or [0, total])
    position = torch.arange(total) - torch.repeat_interleave(starts[:-1], starts.diff())
    rotated = layer.qk_rope_head_dim if isinstance(layer, GroupedDifferentialLatentAttention) else layer.head_dim
    options: dict[str, Any] = {}
    if bounds is not None:
        options = {"cu_seqlens": starts.int(), "max_seqlen": int(starts.diff().max())}
    out: Any = layer(x, RotaryEmbedding(rotated)(position[None, part], x.dtype), **options)
    out.backward(grad[:, part])
    return out.detach()  # type: ignore[no-any-return]


def compare() -> None:
    """Outputs and gradients of layers and layouts of documents are those of one process."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for seed, name in enumerate(_LAYERS):
        for tokens, left, bounds in documents(ranks, seed):
            x, grad = torch.randn(2, 1 if bounds else 2, ranks * tokens, WIDTH, dtype=torch.float64).unbind()
            dist.broadcast(x, 0), dist.broadcast(grad, 0)
            part = slice(rank * tokens, (rank + 1) * tokens)
            whole, layer = build(name, left), build(name, left)
            layer.context_group = dist.group.WORLD
            given, own = x.clone().requires_grad_(), x[:, part].clone().requires_grad_()
            expected = _attend(whole, given, grad, bounds, slice(None))
            found = _attend(layer, own, grad, bounds, part)
            about = f"{name}, rank {rank} of {ranks}, {tokens} tokens each, window {left}, documents {bounds}"

            def same(a: Tensor, b: Tensor, about: str = about) -> None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m: f"{about}: {m}")

            same(found, expected[:, part])
            assert own.grad is not None
            assert given.grad is not None
            same(own.grad, given.grad[:, part])
            for (key, parameter), other in zip(layer.named_parameters(), whole.parameters(), strict=True):
                assert parameter.grad is not None
                assert other.grad is not None
                dist.all_reduce(parameter.grad)
                same(parameter.grad, other.grad, f"{about}, {key}")
    dist.destroy_process_group()


class Messages(TorchDispatchMode):
    """Notes each collective, forward and backward, with the bytes that it brings this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace.startswith(("_c10d", "c10d")) and "wait" not in name and "wrap" not in name:
            self.received.append((name, out.numel() * out.itemsize))
        return out


def count(left: int) -> None:
    """A window's layer sends one message of its keys forward and one back, however long the row."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, numbers in NUMBERS.items():
        for tokens in (left, 4 * left):
            layer = build(name, left)
            layer.context_group = dist.group.WORLD
            x = torch.randn(1, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
            total = ranks * tokens
            with Messages() as messages:
                part = slice(rank * tokens, (rank + 1) * tokens)
                _attend(layer, x, torch.ones(1, total, WIDTH, dtype=torch.float64), [0, 5, total], part)
            keys = left * numbers * x.itemsize
            forward, backward = (0 if rank == 0 else keys), (0 if rank == ranks - 1 else keys)
            assert messages.received == [("all_to_all_single", forward), ("all_to_all_single", backward)], name
    dist.destroy_process_group()
