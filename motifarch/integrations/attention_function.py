"""DIFF V1 as a registered transformers attention function:
``attn_implementation="motifarch_diff_v1"``.

An attention function gets queries, keys and values of an attention module and gives what o_proj
reads. That is enough for DIFF V1 (arXiv 2410.05258), whose tensors have the shapes of softmax
attention with as many heads: of a module's 2H query heads, head 2i is signal and 2i + 1 noise; of
its 2Hk key heads likewise; value heads 2i and 2i + 1 side by side are one of width 2D. The H
outputs of width 2D are as wide as 2H of width D, so that o_proj stays as it is, and so do rotary
embeddings, norms of queries and keys, and the cache. All that is new are lambda's four vectors and
the sub-norm, which :func:`add_lambdas` puts on the modules.

    from motifarch.integrations.attention_function import add_lambdas
    model = LlamaForCausalLM(config)  # an even number of heads and of key/value heads
    add_lambdas(model)                # and sets the attention implementation

The parameters have the names that MotifForCausalLM gives them: a Llama with lambdas and a Motif
model of ``attention_type="diff_v1"`` with ``hidden_act="silu"`` take each other's state dicts. A
class whose ``__init__`` calls ``add_lambdas`` is loaded by ``from_pretrained``; a plain
LlamaForCausalLM would leave the lambdas out.

Padding on either side, packed documents, windows, softcapping and all caches are served through the
mask function of the same name. What the interface does not allow:

- groups of several signal heads, or keys and values of single width: o_proj reads all query heads.
  :func:`motifarch.integrations.patch` changes the modules instead.
- DIFF V2: its lambda is a function of the hidden states, which an attention function does not get.
- DiffLlama: its module takes the difference itself, of what two calls of plain attention gave.
- attention maps (``output_attentions``), dropout, and masks of every query and key (B, 1, S, S).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from motifarch.integrations.attention import as_kernels_take, attend_heads
from motifarch.integrations.masks import VisibleKeys, visible_keys
from motifarch.layers import default_lambda_init
from motifarch.layers.grouped_differential_attention import scalar_lambda
from motifarch.layers.head_norm import SubNorm

IMPLEMENTATION = "motifarch_diff_v1"
"""The models' ``attn_implementation``."""

LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def add_lambdas(
    model: PreTrainedModel, *, lambda_init: float | None = None, sub_norm: bool = True, norm_eps: float = 1e-5
) -> None:
    """Put what DIFF V1 needs on every attention module of a model, in place, and have it call this
    file's function.

    Lambdas start as the paper's do.

    Args:
        model: of a transformers family whose attention modules have q_proj, k_proj, v_proj and
            o_proj, and call the attention function of their config.
        lambda_init: the constant in lambda; default: by each module's layer_idx,
            :func:`motifarch.layers.default_lambda_init`.
        sub_norm: normalise each head's output and scale it by ``1 - lambda_init``.
        norm_eps: the sub-norm's epsilon.

    Raises:
        ValueError: the model has no such modules, or their heads do not come in pairs.
    """
    modules = dict(_attention_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention modules with {', '.join(_PROJECTIONS)} and without lambdas of "
            "their own; see motifarch.layers for layers to build a model from"
        )
    for name, module in modules.items():
        _check(name, module)
    for module in modules.values():
        weight = module.q_proj.weight
        for vector in LAMBDA_VECTORS:
            values = torch.empty(module.head_dim, device=weight.device, dtype=weight.dtype).normal_(std=0.1)
            module.register_parameter(vector, nn.Parameter(values))
        module.lambda_init = default_lambda_init(module.layer_idx) if lambda_init is None else float(lambda_init)
        width = 2 * module.head_dim
        module.subln = SubNorm(width, eps=norm_eps, device=weight.device, dtype=weight.dtype) if sub_norm else None
        module.out_scale = 1.0 - module.lambda_init if sub_norm else 1.0
        module.backend, module.motifarch_pairs = "auto", True
        module.register_forward_pre_hook(_check_implementation)
    model.set_attn_implementation(IMPLEMENTATION)
    model.create_masks_for_generate = _leave_mask  # type: ignore[assignment]  # generate() looks for it


def _check_implementation(module: Any, _: Any) -> None:
    """Other attention functions would take noise heads for heads like all others, and run."""
    found = module.config._attn_implementation
    if found != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation is {found!r}, which knows no lambdas; this model needs "
            f"model.set_attn_implementation({IMPLEMENTATION!r})"
        )


def _leave_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """For generate()'s mask over a static cache: none of every query and key is made."""
    return attention_mask


def paired_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleKeys | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function, in the shape that transformers calls.

    Args:
        module: an attention module with what :func:`add_lambdas` gives it.
        query: (B, 2H, S, D), signal and noise heads in turn.
        key: (B, 2Hk, Sk, D), those of a cache included, in turn likewise.
        value: (B, 2Hk, Sk, D).
        attention_mask: what :func:`motifarch.integrations.masks.visible_keys` made of the model's
            mask.
        scaling: multiplies the logits; default ``D ** -0.5``.
        is_causal: must not be False.
        **options: those of :func:`motifarch.integrations.attention.attend_heads`.

    Returns:
        (B, S, H, 2D), and None for the attention maps.

    Raises:
        ValueError: the module has no lambdas, or what this attention does not have is asked for.
    """
    if not getattr(module, "motifarch_pairs", False):
        raise ValueError(
            f"attn_implementation {IMPLEMENTATION!r} needs lambdas on {type(module).__name__}: call "
            "motifarch.integrations.attention_function.add_lambdas(model) first"
        )
    both_sides = isinstance(attention_mask, VisibleKeys) and attention_mask.causal is False
    if is_causal is False or both_sides or not getattr(module, "is_causal", True):
        raise ValueError(f"attn_implementation {IMPLEMENTATION!r} is causal, but {type(module).__name__} is not")
    q, k, v = as_kernels_take(query, key, value)
    out = attend_heads(
        module,
        (q[:, :, 0::2], k[:, :, 0::2], q[:, :, 1::2], k[:, :, 1::2], v.unflatten(2, (-1, 2)).flatten(3)),
        scalar_lambda(module),
        attention_mask,
        scaling=module.head_dim**-0.5 if scaling is None else scaling,
        **options,
    )
    return out, None


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        projects = all(isinstance(getattr(module, p, None), nn.Linear) for p in _PROJECTIONS)
        if projects and hasattr(module, "layer_idx") and not hasattr(module, LAMBDA_VECTORS[0]):
            yield name, module


def _check(name: str, module: Any) -> None:
    """Raise ValueError unless the module's heads come in pairs and o_proj reads them all."""
    for kind, projection in (("query", module.q_proj), ("key", module.k_proj), ("value", module.v_proj)):
        width = projection.out_features
        heads = width // module.head_dim
        if heads % 2 or heads * module.head_dim != width:
            raise ValueError(
                f"{name} has {width / module.head_dim:g} {kind} heads of width {module.head_dim}; DIFF V1 needs an "
                "even number: half are signal and half noise"
            )
    if module.o_proj.in_features != module.q_proj.out_features:
        raise ValueError(
            f"{name}.o_proj reads {module.o_proj.in_features} numbers, but DIFF V1's heads give as many as there are "
            f"in the queries, {module.q_proj.out_features}"
        )


AttentionInterface.register(IMPLEMENTATION, paired_attention)
AttentionMaskInterface.register(IMPLEMENTATION, visible_keys)
