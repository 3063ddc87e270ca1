"""Attention layers written down from their weights, head by head, with masks and a context: no code
shared with them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


def plain_layer(layer: Any, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The output of a layer without rotary embeddings and windows, not causal, for (B, S, E).

    Args:
        layer: GDA, DIFF V1, DIFF V2 without a gate, or softmax attention.
        x: where queries come from.
        context: where keys and values come from; default x.
        bias: (B, num_heads, Sq, Sk), added to the logits; -inf hides a key.
    """
    context = x if context is None else context
    rows = range(len(x))
    return torch.stack([_row(layer, x[i], context[i], None if bias is None else bias[i]) for i in rows])


def as_bias(mask: Tensor) -> Tensor:
    """A mask of torch's scaled_dot_product_attention as what is added to logits."""
    return mask.double().log() if mask.dtype == torch.bool else mask


def _heads(x: Tensor, projection: nn.Linear, width: int) -> tuple[Tensor, ...]:
    out = x @ projection.weight.T
    return (out if projection.bias is None else out + projection.bias).split(width, dim=-1)


def _row(layer: Any, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
    width, blocks = layer.head_dim, layer.num_noise_heads
    of_a_pair = 2 if layer.paired_kv else 1
    q, k = _heads(x, layer.q_proj, width), _heads(context, layer.k_proj, width)
    v = _heads(context, layer.v_proj, of_a_pair * width)

    def attend(head: int, key: Tensor, value: Tensor) -> Tensor:
        logits = q[head] @ key.T / math.sqrt(width)
        return (logits if bias is None else logits + bias[head]).softmax(-1) @ value

    if not blocks:
        shared = len(q) // len(k)
        out = [attend(h, k[h // shared], v[h // shared]) for h in range(len(q))]
        return _project(torch.cat(out, dim=-1), layer)
    out, size = [], len(q) // blocks
    for n in range(blocks):
        pair = n // (blocks // len(v))
        k1, k2 = k[of_a_pair * pair], k[of_a_pair * pair + of_a_pair - 1]
        noise = attend(n * size + size - 1, k2, v[pair])
        for j in range(size - 1):
            difference = attend(n * size + j, k1, v[pair]) - _lambda(layer, x, len(out)) * noise
            if layer.subln is not None:
                rms = difference.square().mean(-1, keepdim=True).add(1e-5).sqrt()
                difference = (1 - layer.lambda_init) * difference / rms * layer.subln.weight
            out.append(difference)
    return _project(torch.cat(out, dim=-1), layer)


def _lambda(layer: Any, x: Tensor, head: int) -> Any:
    if hasattr(layer, "lambda_proj"):
        return torch.sigmoid(x @ layer.lambda_proj.weight.T)[:, head, None]
    first = (layer.lambda_q1 * layer.lambda_k1).sum().exp()
    return first - (layer.lambda_q2 * layer.lambda_k2).sum().exp() + layer.lambda_init


def _project(out: Tensor, layer: Any) -> Tensor:
    out = out @ layer.o_proj.weight.T
    return out if layer.o_proj.bias is None else out + layer.o_proj.bias
