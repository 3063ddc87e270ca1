"""Weights of microsoft/unilm's differential attention modules, in motifarch's layers.

Both keep heads in the same order: (signal, noise) pairs of queries and keys, values of twice the
width. They differ in the rotary embedding: unilm rotates neighbouring numbers, motifarch's layers
the two halves of a head.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from motifarch.layers import DifferentialAttention, DifferentialAttentionV2

_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def rotary_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection that was trained with interleaved rotary embeddings, in the
    order that the rotate-half form takes.

    Number 2i of each head goes to i, number 2i + 1 to i + head_dim / 2. Queries and keys that are
    both ordered so have the same products as before.

    Args:
        weight: (heads * head_dim, ...), a projection's weight or bias.
        head_dim: D, even.

    Raises:
        ValueError: the rows are not whole heads, or head_dim is odd.
    """
    if head_dim < 2 or head_dim % 2 or weight.shape[0] % head_dim:
        raise ValueError(
            f"a weight with {weight.shape[0]} rows has no whole heads of head_dim={head_dim}, which must be even; give "
            "the head_dim that it was trained with"
        )
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def attention_from_unilm(
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    layer_idx: int,
    num_kv_heads: int | None = None,
    naive: bool = False,
    **options: Any,
) -> DifferentialAttention | DifferentialAttentionV2:
    """The same function as a differential attention module of microsoft/unilm, as a layer.

    Known are ``MultiheadDiffAttn``, ``MultiheadFlashDiff1`` and ``2`` (DIFF V1), and
    ``MultiheadFlashDiffV2`` with ``lambda_proj`` (DIFF V2); of a model that was split over ranks,
    the whole weights. Give the layer tables of the same frequencies:
    :class:`~motifarch.layers.RotaryEmbedding` takes ``base`` or ``inv_freq``.

    Args:
        weights: the module's state_dict. Each tensor's dtype and device stay; lambda's are float32
            there.
        num_heads: as in unilm's constructor: heads of the output, half of the query heads.
        layer_idx: the module's ``depth``, from 0.
        num_kv_heads: as in unilm's constructor: for DIFF V1, half of the key heads. Default:
            num_heads.
        naive: whether the weights were trained with ``MultiheadDiffAttn``. It repeats key heads
            before it pairs them, so that with num_kv_heads < num_heads it is another function than
            the other two files'. The layer then has a pair of key heads for each head, and a larger
            cache.
        **options: of every attention layer
            (:class:`~motifarch.layers.base_attention.BaseAttention`), but ``device`` and ``dtype``.

    Raises:
        ValueError: a tensor is missing, left over, or of a shape that the heads do not give.

    Source: Diff-Transformer in https://github.com/microsoft/unilm; arXiv 2410.05258.
    """
    second = "lambda_proj.weight" in weights
    out = "o_proj.weight" if second else "out_proj.weight"
    own = ("lambda_proj.weight",) if second else (*_VECTORS, "subln.weight")
    names = {"q_proj.weight", "k_proj.weight", "v_proj.weight", out, *own}
    if names != set(weights):
        missing, other = sorted(names - set(weights)), sorted(set(weights) - names)
        raise ValueError(
            f"weights lack {', '.join(missing) or 'nothing'} and have {', '.join(other) or 'nothing'} besides; give "
            f"the state_dict of one attention module of unilm, whose names are {', '.join(sorted(names))}"
        )
    hidden_size, kv_heads = weights["q_proj.weight"].shape[1], num_kv_heads or num_heads
    head_dim = weights["q_proj.weight"].shape[0] // (2 * num_heads)
    state = dict(weights)
    state["o_proj.weight"] = state.pop(out)
    for name in ("q_proj.weight", "k_proj.weight"):
        state[name] = rotary_halves(state[name], head_dim)
    if naive and not second and kv_heads < num_heads:
        state |= _repeated(state, num_heads, kv_heads, head_dim)
        kv_heads = num_heads
    heads: dict[str, Any] = {"num_heads": 2 * num_heads, "head_dim": head_dim, "layer_idx": layer_idx}
    layer: DifferentialAttention | DifferentialAttentionV2
    if second:
        layer = DifferentialAttentionV2(hidden_size, num_kv_heads=kv_heads, **heads, **options, device="meta")
    else:
        layer = DifferentialAttention(hidden_size, num_kv_heads=2 * kv_heads, **heads, **options, device="meta")
    for name, expected in layer.state_dict().items():
        if name in state and state[name].shape != expected.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, but num_heads={num_heads} and num_kv_heads={kv_heads} "
                f"need {tuple(expected.shape)}; give the numbers of unilm's constructor"
            )
    layer.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return layer


def _repeated(state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """Keys and values with heads of their own for each head: query head i of 2 num_heads sees key
    head i // n there, where n heads share one.
    """
    n = num_heads // num_kv_heads
    key, value = state["k_proj.weight"], state["v_proj.weight"]
    return {
        "k_proj.weight": key.unflatten(0, (-1, head_dim)).repeat_interleave(n, 0).flatten(0, 1),
        "v_proj.weight": value.unflatten(0, (-1, 2 * head_dim)).repeat_interleave(n, 0).flatten(0, 1),
    }
