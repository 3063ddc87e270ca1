"""Motif-3's attention, (192, 128): a key of three parts, which 4 signal heads and their noise head
share, by the Triton kernels with the tiles that are shipped. The exact results are torch's softmax
attention of each map in float64, and their difference.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers.interpreter import require_interpreter
from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import diff_attn_func, diff_attn_varlen_func

pytest.importorskip("triton", reason="the Triton kernels need triton")

GROUPS, RATIO, D, DV, WINDOW = 1, 4, 192, 128, (128, 0)
LENGTHS = [141, 0, 7]


def visible(lengths: list[int]) -> Tensor:
    """(S, S): a token sees itself and the 128 before it, in its own document."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(sum(lengths))[:, None] - torch.arange(sum(lengths))
    return (document[:, None] == document) & (distance >= 0) & (distance <= WINDOW[0])


def maps(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """A map's output (B, S, H, Dv), and the largest logit of each head."""
    q, k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (q, k, v))
    logits = (q * D**-0.5 @ k.mT).masked_fill(~seen, -torch.inf)
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen) if exact else logits.softmax(-1) @ v
    return out.transpose(1, 2), logits.amax((0, 2, 3))


def composed(q1: Tensor, k: Tensor, q2: Tensor, v: Tensor, lam: Tensor, gate: Tensor, seen: Tensor) -> list[Tensor]:
    """The output and both maps' largest logits, as one writes it down."""
    exact = q1.dtype == torch.float64
    (signal, most), (noise, most_noise) = maps(q1, k, v, seen, exact), maps(q2, k, v, seen, exact)
    difference = signal - lam[..., None].to(q1.dtype) * noise.repeat_interleave(RATIO, 2)
    return [difference * torch.sigmoid(gate), most, most_noise]


def draw(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q1, k, q2, v, lam, gate."""
    generator = torch.Generator().manual_seed(3)
    signal = RATIO * GROUPS
    shapes = [(signal, D), (GROUPS, D), (GROUPS, D), (GROUPS, DV), (signal,), (signal, DV)]
    q1, k, q2, v, lam, gate = (torch.randn(1, tokens, *s, generator=generator) for s in shapes)
    lam = torch.sigmoid(lam)
    q1, k, q2, v, gate = (t.to(dtype) for t in (q1, k, q2, v, gate))
    return [q1, k, q2, v, lam, gate]


@pytest.mark.parametrize(("dtype", "packed"), [(torch.float16, True), (torch.float32, False)])
def test_attention_of_motif_3(dtype: torch.dtype, packed: bool) -> None:
    """Window, documents, lambda of each token and head, gate, largest logits: both directions."""
    require_interpreter()
    lengths = LENGTHS if packed else [sum(LENGTHS)]
    given, seen = draw(sum(lengths), dtype), visible(lengths)
    grad = torch.randn(*given[5].shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    options = {"causal": True, "window_size": WINDOW, "return_max_logits": True, "backend": "triton"}

    def fused(q1: Tensor, k: Tensor, q2: Tensor, v: Tensor, lam: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        if not packed:
            found: tuple[Tensor, ...] = diff_attn_func(q1, k, q2, k, v, lam, gate=gate, **options)  # type: ignore[assignment, arg-type]
            return found
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        q1, k, q2, v, lam, gate = (t[0] for t in (q1, k, q2, v, lam, gate))
        documents = (bounds, bounds, max(lengths), max(lengths))
        out, *most = diff_attn_varlen_func(q1, k, q2, k, v, lam, *documents, gate=gate, **options)  # type: ignore[arg-type]
        return (out[None], *most)

    results = []
    plain = partial(composed, seen=seen)
    runs: tuple[tuple[torch.dtype | None, Callable[..., Sequence[Tensor]]], ...]
    runs = ((None, fused), (dtype, plain), (torch.float64, plain))
    for kind, function in runs:
        own = leaves(*given, dtype=kind)
        found = function(*own)
        results.append([*found, *gradients(found[0], own, grad)])
    for ours, theirs, exact in zip(*results, strict=True):
        assert_error_rule(ours, theirs, exact, precision=dtype)
