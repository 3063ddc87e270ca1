"""Tensor parallelism: ranks share heads, the feed-forward's width and the vocabulary
(Megatron-LM, arXiv 1909.08053).

Attention is cut by noise head: a rank has whole groups of signal heads with their noise head and
the keys and values that they share. What all heads share (sub-norm, lambda, norms of queries and
keys) every rank has; its gradient is summed in the layer. PolyNorm sums its moments over the ranks.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from motifarch.errors import UserError

_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def check_tensor_parallel(config: Any, ranks: int) -> None:
    """Refuses a MotifConfig's model that so many ranks cannot share.

    Raises:
        UserError: naming the number that does not divide, and those that would, or a part that is
            not cut.
    """
    check_cuts_model(config, "tensor", ranks)
    # Whole groups of noise heads, key/value heads and columns are shared. Words need not divide:
    # the last ranks have fewer.
    width = {"columns of model.intermediate_size": config.intermediate_size}
    for name, count in (head_counts(config) | width).items():
        if count % ranks:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise UserError(
                f"parallel.tensor is {ranks}, which does not divide the {count} {name}; it may be {fitting}"
            )


def check_cuts_model(config: Any, dimension: str, ranks: int) -> None:
    """Refuses a MotifConfig's model with parts that "tensor" and "context" parallelism can't cut.

    Raises:
        UserError: naming the part's field and what goes instead.
    """
    parts = {
        "attention_type": (config.is_latent, "attention from latents"),
        "num_experts": (config.num_experts, "a mixture of experts"),
        "mhc_enabled": (config.mhc_enabled, "hyper-connections"),
        "num_nextn_predict_layers": (config.num_nextn_predict_layers, "multi-token prediction"),
    }
    for field, (has, part) in parts.items():
        if ranks > 1 and has:
            raise UserError(
                f"parallel.{dimension} is {ranks} and model.{field} {getattr(config, field)}: {part} is not cut over "
                f"these ranks yet; set parallel.{dimension} to 1 and use parallel.shard and parallel.replicate"
            )


def head_counts(config: Any) -> dict[str, int]:
    """The groups of heads that stay together, and the key/value heads (or their pairs)."""
    if config.attention_type == "softmax":
        queries = {"heads (model.num_attention_heads)": config.num_attention_heads}
    else:
        queries = {"noise heads (model.num_noise_heads)": config.noise_heads}
    keys = config.num_key_value_heads // (2 if config.has_paired_kv else 1)
    return queries | {f"key/value {'pairs' if config.has_paired_kv else 'heads'} (model.num_key_value_heads)": keys}


def projection_styles(config: Any, block: str) -> dict[str, str]:
    """How a MotifConfig has the projections of "self_attn" or "mlp" cut: "colwise" or "rowwise"."""
    prefix = f"layers.*.{block}."
    plan: dict[str, str] = config.base_model_tp_plan
    return {n.removeprefix(prefix): s for n, s in plan.items() if n.startswith(prefix) and s in _STYLES}


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts a model, on the meta device or the same on every rank, over a one-dimensional mesh."""
    group = mesh.get_group()
    styles = {name: projection_styles(model.config, name) for name in ("self_attn", "mlp")}
    for layer in model.model.layers:  # type: ignore[union-attr]
        for name, others in (("self_attn", (None,)), ("mlp", ())):  # arguments after the hidden states
            block = layer.get_submodule(name)
            parallelize_module(block, mesh, {n: _STYLES[style]() for n, style in styles[name].items()})
            # A DTensor's gradient is summed over the ranks once, not once for each projection.
            replicated = PrepareModuleInput(
                input_layouts=(Replicate(), *others),
                desired_input_layouts=(Replicate(), *others),
                use_local_output=False,
            )
            parallelize_module(block, mesh, replicated)
        layer.self_attn.share_heads(group)
        if hasattr(layer.mlp, "act_fn"):
            layer.mlp.act_fn.group = group
    tied = model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    parallelize_module(model.get_submodule("model"), mesh, {"embed_tokens": RowwiseParallel(input_layouts=Replicate())})
    # The loss takes each rank's words as they are; who asks for logits gets them whole.
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(use_local_output=False)})
    model.register_forward_hook(_gather_logits)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]


def _gather_logits(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # return_dict=False
        return tuple(t.full_tensor() if isinstance(t, DTensor) else t for t in output)
    if isinstance(output.logits, DTensor):
        output.logits = output.logits.full_tensor()
    return output
