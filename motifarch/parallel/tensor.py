"""Tensor parallelism: ranks share heads, the feed-forward's width and the vocabulary
(Megatron-LM, arXiv 1909.08053).

Attention is cut by noise head: a rank has whole groups of signal heads with their noise head and
the keys and values that they share. What all heads share (sub-norm, lambda, norms of queries and
keys) every rank has; its gradient is summed in the layer. PolyNorm sums its moments over the ranks.

Of latent attention all that comes before the heads, up to the latents and their norms, is on every
rank. Backward, gradients of the latents are summed, which are narrower than the hidden states, and
everything before them is then whole. Hyper-connections, norms, routers, routed experts and the
projection of multi-token prediction's input are on every rank too, with the same tokens and the
same whole gradients: nothing is summed.
"""

from typing import Any, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from motifarch.decoder_layers import decoder_layers
from motifarch.errors import UserError
from motifarch.layers import GroupedDifferentialLatentAttention

_COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lambda_proj", "wq_b", "wq_b_gate", "wkv_b")
_ROWWISE = ("o_proj", "down_proj", "wo")
_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
_WHOLE = (Replicate(),)


def check_tensor_parallel(config: Any, ranks: int) -> None:
    """Refuses a MotifConfig's model that so many ranks cannot share.

    Raises:
        UserError: naming the number that does not divide, and those that would.
    """
    # Whole groups of noise heads, key/value heads and columns are shared. Words need not divide:
    # the last ranks have fewer.
    for name, count in (head_counts(config) | _widths(config)).items():
        if count % ranks:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise UserError(
                f"parallel.tensor is {ranks}, which does not divide the {count} {name}; it may be {fitting}"
            )


def head_counts(config: Any) -> dict[str, int]:
    """The groups of heads that stay together, and the key/value heads (or their pairs)."""
    if not config.noise_heads:
        queries = {"heads (model.num_attention_heads)": config.num_attention_heads}
    else:
        queries = {"noise heads (model.num_noise_heads)": config.noise_heads}
    keys = config.num_key_value_heads // (2 if config.has_paired_kv else 1)
    return queries | {f"key/value {'pairs' if config.has_paired_kv else 'heads'} (model.num_key_value_heads)": keys}


def _widths(config: Any) -> dict[str, int]:
    """The columns of the feed-forward blocks that are cut."""
    widths = {}
    if config.num_nextn_predict_layers or not all(map(config.has_experts, range(config.num_hidden_layers))):
        widths["columns of model.intermediate_size"] = config.intermediate_size
    if config.num_experts and config.num_shared_experts:
        shared = config.num_shared_experts * config.moe_intermediate_size
        widths["columns of shared experts (model.num_shared_experts x model.moe_intermediate_size)"] = shared
    return widths


def projection_style(name: str) -> Literal["colwise", "rowwise"] | None:
    """How a linear layer of attention or of a dense feed-forward block is cut, by its name."""
    return "colwise" if name in _COLWISE else "rowwise" if name in _ROWWISE else None


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts a model, on the meta device or the same on every rank, over a one-dimensional mesh."""
    for layer in decoder_layers(model):
        _cut_attention(layer.get_submodule("self_attn"), mesh)
        experts = getattr(layer, "moe", None)
        feed_forward = layer.mlp if experts is None else experts.shared_experts
        if feed_forward is not None:
            _cut_feed_forward(feed_forward, mesh)  # type: ignore[arg-type]
    tied = model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    parallelize_module(model.get_submodule("model"), mesh, {"embed_tokens": RowwiseParallel(input_layouts=Replicate())})
    # The loss takes each rank's words as they are; who asks for logits gets them whole.
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(use_local_output=False)})
    model.register_forward_hook(_gather_logits)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]


def _cut_attention(attention: nn.Module, mesh: DeviceMesh) -> None:
    latent = isinstance(attention, GroupedDifferentialLatentAttention)
    _cut_projections(attention, mesh, but=("lambda_proj",) if latent else ())
    if latent:
        whole = PrepareModuleOutput(output_layouts=_WHOLE, desired_output_layouts=_WHOLE, use_local_output=False)
        parallelize_module(attention, mesh, {"q_norm": whole})
    else:
        _share_input(attention, mesh, None)  # rotary tables follow the hidden states
    attention.share_heads(mesh.get_group())  # type: ignore[operator]


def _cut_feed_forward(block: nn.Module, mesh: DeviceMesh) -> None:
    _cut_projections(block, mesh)
    _share_input(block, mesh)
    if hasattr(block, "act_fn"):
        block.act_fn.group = mesh.get_group()  # type: ignore[union-attr, assignment]


def _cut_projections(block: nn.Module, mesh: DeviceMesh, but: tuple[str, ...] = ()) -> None:
    styles = {name: projection_style(name) for name, _ in block.named_children() if name not in but}
    parallelize_module(block, mesh, {name: _STYLES[style]() for name, style in styles.items() if style})


def _share_input(block: nn.Module, mesh: DeviceMesh, *others: None) -> None:
    """Makes one DTensor of a block's input, whose gradient is then summed over the ranks once, not
    once for each projection.
    """
    layouts = (*_WHOLE, *others)
    whole = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts, use_local_output=False)
    parallelize_module(block, mesh, whole)


def _gather_logits(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # return_dict=False
        return tuple(t.full_tensor() if isinstance(t, DTensor) else t for t in output)
    if isinstance(output.logits, DTensor):
        output.logits = output.logits.full_tensor()
    return output
