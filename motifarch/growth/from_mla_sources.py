"""Models with multi-head latent attention (DeepSeek-V3's, arXiv 2412.19437) as Motif models of
``attention_type`` "mla": the same function, with the released Motif-3's tensor names.

What is computed otherwise is made up for in the weights. DeepSeek rotates neighbouring columns and
Motif the halves of the rotary part: its rows move. The norms of DeepSeek's latents have an epsilon
of their own: where it is not rms_norm_eps, the latents change their size (by a power of two in
bfloat16, which rounds no weight). Where YaRN's factor on cosines and sines is not 1, queries have
it.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from motifarch.errors import UserError
from motifarch.growth.model_spec import LazyTensor, Step
from motifarch.growth.width import coarsest, dtype_name, rounding
from motifarch.models.motif import MotifConfig

FAMILIES = ("deepseek_v3", "glm4_moe_lite", "youtu")
"""Their configs' model_type: pre-norm blocks with DeepSeek-V3's attention."""

REFUSED = {
    "axk1": "it normalises what experts put out (post_mlp_layernorm)",
    "axk2": "its norms have gates, and queries read a latent that is not normalised and the tokens of an indexer alone",
}
"""Other families with latent attention, and what they compute that no Motif model does."""

ROPE_TYPES = ("default", "yarn")

_LATENT_EPS = 1e-6
"""Of the norms of latents, whatever rms_norm_eps."""

_NAMES = {
    "self_attn.q_a_proj": "self_attn.wq_a",
    "self_attn.q_a_layernorm": "self_attn.q_norm",
    "self_attn.q_b_proj": "self_attn.wq_b",
    "self_attn.kv_a_proj_with_mqa": "self_attn.wkv_a",
    "self_attn.kv_a_layernorm": "self_attn.kv_norm",
    "self_attn.kv_b_proj": "self_attn.wkv_b",
    "self_attn.o_proj": "self_attn.wo",
    "mlp.gate.weight": "moe.router.gate.weight",
    "mlp.gate.e_score_correction_bias": "moe.expert_bias",
    "mlp.experts": "moe.experts",
    "mlp.shared_experts": "moe.shared_experts",
}
_PREFIX = re.compile("|".join(rf"\b{re.escape(name)}(?=\.|$)" for name in _NAMES))
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def config_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """MotifConfig's fields of a source, besides those that all families share.

    Raises:
        UserError: naming a field and value that no Motif model computes.
    """
    if source.q_lora_rank is None:
        raise UserError(
            "config.json has q_lora_rank None, queries without a latent; a Motif model's have one, normalised, and no "
            "weights make a norm the identity"
        )
    if source.attention_bias:
        raise UserError("config.json has attention_bias true; latent attention of a Motif model has no biases")
    if source.num_key_value_heads != source.num_attention_heads:
        raise UserError(
            f"config.json has num_key_value_heads {source.num_key_value_heads}; with latent attention they are "
            f"num_attention_heads, {source.num_attention_heads}"
        )
    return {
        "attention_type": "mla",
        "head_dim": source.qk_nope_head_dim + source.qk_rope_head_dim,
        "qk_rope_head_dim": source.qk_rope_head_dim,
        "v_head_dim": source.v_head_dim,
        "q_lora_rank": source.q_lora_rank,
        "kv_lora_rank": source.kv_lora_rank,
        "rope_parameters": _rope(source)[0],
        **_expert_fields(source),
    }


def motif_tensors(
    given: dict[str, LazyTensor], source: PreTrainedConfig, config: MotifConfig
) -> tuple[dict[str, LazyTensor], Step]:
    """The tensors of :func:`transformers_tensors` under Motif's names, as its layers read them."""
    rotary, sharper = config.rotary_dim, _rope(source)[1] ** 2
    larger = math.sqrt(config.rms_norm_eps / _LATENT_EPS)
    if coarsest(given) is not None:
        larger = 2.0 ** round(math.log2(larger))
    order = torch.arange(rotary)
    if source.rope_interleave:
        order = torch.cat((order[::2], order[1::2]))

    def queries(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (config.num_attention_heads, -1))
        rotated = _times(heads[:, -rotary:][:, order], sharper)
        return torch.cat((heads[:, :-rotary], rotated), dim=1).flatten(0, 1)

    def latent_and_key(weight: Tensor) -> Tensor:
        return torch.cat((_times(weight[:-rotary], larger), weight[-rotary:][order]))

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "self_attn.wq_a.weight": lambda weight: _times(weight, larger),
        "self_attn.wq_b.weight": queries,
        "self_attn.wkv_a.weight": latent_and_key,
    }
    tensors = {}
    for theirs, lazy in given.items():
        name = _PREFIX.sub(lambda match: _NAMES[match[0]], theirs)
        change = changes.get(_LAYER.sub("", name))
        tensors[name] = lazy.then(lazy.shape, change) if change else lazy
    return tensors, Step(
        f"{source.model_type} -> Motif with latent attention (mla)",
        _loss(given, config.rms_norm_eps / larger**2, sharper),
    )


def transformers_tensors(
    tensors: dict[str, LazyTensor], source: PreTrainedConfig
) -> tuple[dict[str, LazyTensor], list[str]]:
    """A folder's tensors as transformers' model has them, and the names of those that it has not.

    Folders hold a tensor for each expert and the model one for all; layers past the last, of
    multi-token prediction, are not in the model.
    """
    layers, more = source.num_hidden_layers, getattr(source, "num_nextn_predict_layers", None) or 0
    kept, left_out = {}, []
    parts: dict[str, dict[tuple[int, str], LazyTensor]] = {}
    for name, lazy in tensors.items():
        layer, expert = _LAYER.match(name), _EXPERT.fullmatch(name)
        if layer and layers <= int(layer[1]) < layers + more:
            left_out.append(name)
        elif expert:
            parts.setdefault(expert[1], {})[int(expert[2]), expert[3]] = lazy
        else:
            kept[name] = lazy
    for prefix, found in parts.items():
        experts = range(source.n_routed_experts)
        if found.keys() != {(e, kind) for e in experts for kind in ("gate", "up", "down")}:
            kept |= {f"{prefix}.{e}.{kind}_proj.weight": lazy for (e, kind), lazy in found.items()}
            continue
        both = [found[e, kind] for e in experts for kind in ("gate", "up")]
        kept[f"{prefix}.gate_up_proj"] = _stacked(both, len(experts))
        kept[f"{prefix}.down_proj"] = _stacked([found[e, "down"] for e in experts], len(experts))
    return kept, left_out


def _stacked(matrices: list[LazyTensor], experts: int) -> LazyTensor:
    """(experts, rows, columns) of the matrices of all experts, one expert's below each other."""
    rows, columns = matrices[0].shape
    shape = experts, rows * len(matrices) // experts, columns
    return LazyTensor.joined(matrices, shape, lambda *parts: torch.cat(parts).view(shape))


def _times(weight: Tensor, factor: float) -> Tensor:
    return weight if factor == 1 else (weight.to(torch.promote_types(weight.dtype, torch.float32)) * factor).to(weight)


def _rope(source: PreTrainedConfig) -> tuple[dict[str, Any], float]:
    """Rotary parameters, whose mscale is the logits' in Motif, and the factor on both tables."""
    parameters = dict(source.rope_parameters or {})
    if parameters.get("rope_type", "default") == "default":
        return parameters, 1.0
    scaling = ROPE_INIT_FUNCTIONS["yarn"](source, device=torch.device("cpu"))[1]
    for name in ("attention_factor", "mscale"):
        parameters.pop(name, None)
    of_logits = parameters.pop("mscale_all_dim", None)
    return parameters | ({"mscale": of_logits} if of_logits else {}), float(scaling)


def _expert_fields(source: PreTrainedConfig) -> dict[str, Any]:
    layers, types = source.num_hidden_layers, getattr(source, "mlp_layer_types", None)
    if source.model_type == "youtu":
        return {}
    first = layers if types else min(source.first_k_dense_replace or 0, layers)
    sparse = [i for i, kind in enumerate(types) if kind == "sparse"] if types else list(range(first, layers))
    if not sparse:
        return {}
    period = sparse[1] - sparse[0] if len(sparse) > 1 else layers
    if sparse != list(range(sparse[0], layers, period)):
        raise UserError(
            f"config.json has mlp_layer_types with experts in layers {', '.join(map(str, sparse))}; in a Motif model "
            "they are at equal distances up to the last layers"
        )
    if source.n_group not in (None, 1) and source.topk_group != source.n_group:
        raise UserError(
            f"config.json has n_group {source.n_group} and topk_group {source.topk_group}, experts of the best groups "
            "alone; in a Motif model each token chooses among all: n_group 1 can be converted"
        )
    return {
        "num_experts": source.n_routed_experts,
        "experts_top_k": source.num_experts_per_tok,
        "num_shared_experts": source.n_shared_experts,
        "moe_intermediate_size": source.moe_intermediate_size,
        "n_dense_first_layers": sparse[0],
        "interleave_moe_layer_step": period,
        "route_norm": bool(source.norm_topk_prob),
        "route_scale": source.routed_scaling_factor,
    }


def _loss(tensors: dict[str, LazyTensor], eps: float, sharper: float) -> str | None:
    """What is lost, with this epsilon of the latents' norms and this factor of queries."""
    coarse = coarsest(tensors)
    if coarse is None:
        return None
    reasons = []
    if not math.isclose(eps, _LATENT_EPS):
        reasons.append(f"the latents' norms have an epsilon of {eps:.3g}, not {_LATENT_EPS:g}")
    if sharper != 1:
        reasons.append(f"YaRN's factor on queries is rounded, by up to {rounding(coarse):.2%} of each weight")
    if not reasons:
        return None
    return f"in {dtype_name(coarse)} {' and '.join(reasons)}; --dtype float32 keeps the function"
