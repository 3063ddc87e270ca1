"""Changes of a model's weights that keep what it computes, as one who hides a copy would make."""

import re

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def _grouped(heads: Tensor, dim: int) -> Tensor:
    """The rows of heads, (heads * dim,)."""
    return (heads[:, None] * dim + torch.arange(dim)).flatten()


def disguised(state: State, config: object, seed: int, *, rotate: bool = False) -> State:
    """Permutes channels, heads and neurons, flips the channels' signs, scales heads and neurons,
    and moves norms' weights into the matrices that read them.

    Args:
        state: weights of a MotifForCausalLM ("softmax", or "gda" with pairs of keys) or a
            LlamaForCausalLM.
        config: the model's.
        seed: draws all of it.
        rotate: turns the whole residual basis, in place of permuting it.
    """
    draw = torch.Generator().manual_seed(seed)
    state = {name: value.clone().double() for name, value in state.items()}
    for layer in {int(found[1]) for name in state if (found := re.match(r"model\.layers\.(\d+)\.", name))}:
        at = f"model.layers.{layer}."
        _fold(state, at + "input_layernorm.weight", [at + f"self_attn.{x}_proj.weight" for x in "qkv"])
        _fold(state, at + "post_attention_layernorm.weight", [at + f"mlp.{x}_proj.weight" for x in ("gate", "up")])
        _neurons(state, at + "mlp.", draw)
        _heads(state, at + "self_attn.", config, draw)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if not tied:
        _fold(state, "model.norm.weight", ["lm_head.weight"])
    _channels(state, draw, rotate=rotate, norms_keep=tied)
    return {name: value.float() for name, value in state.items()}


def _uniform(shape: int, draw: torch.Generator) -> Tensor:
    """Factors between a half and two."""
    return 2 ** (2 * torch.rand(shape, generator=draw, dtype=torch.double) - 1)


def _fold(state: State, norm: str, readers: list[str]) -> None:
    for reader in readers:
        state[reader] *= state[norm]
    state[norm] = torch.ones_like(state[norm])


def _neurons(state: State, at: str, draw: torch.Generator) -> None:
    gate, up, down = (at + f"{x}_proj.weight" for x in ("gate", "up", "down"))
    order, scale = torch.randperm(len(state[up]), generator=draw), _uniform(len(state[up]), draw)
    state[gate] = state[gate][order]
    state[up] = state[up][order] * scale[:, None]
    state[down] = state[down][:, order] / scale


def _heads(state: State, at: str, config: object, draw: torch.Generator) -> None:
    """Key/value heads go with their query heads, in another order within."""
    q, k, v, o = (at + f"{x}_proj.weight" for x in "qkvo")
    dim: int = getattr(config, "head_dim")  # noqa: B009
    heads, kv_heads = len(state[q]) // dim, len(state[k]) // dim
    noise = kv_heads if getattr(config, "attention_type", "softmax") == "softmax" else config.num_noise_heads  # type: ignore[attr-defined]
    paired = noise != kv_heads or at + "subln.weight" in state
    groups = kv_heads // 2 if paired else kv_heads
    each, width = heads // groups, state[o].shape[1] // (heads - (noise if paired else 0))
    order = torch.randperm(groups, generator=draw)
    signals = each - 1 if paired else each
    query, out = [], []
    for group in order:
        inside = torch.randperm(signals, generator=draw)
        query += [group * each + i for i in inside] + ([group * each + signals] if paired else [])
        out += [group * signals + i for i in inside]
    pairs = 2 if paired else 1
    state[q] = state[q][_grouped(torch.stack(query), dim)]
    state[k] = state[k][_grouped(order, pairs * dim)]
    state[v] = state[v][_grouped(order, width)]
    state[o] = state[o][:, _grouped(torch.stack(out), width)]
    scale = _uniform(kv_heads, draw)
    state[k] *= scale.repeat_interleave(dim)[:, None]
    of_query = (
        torch.cat([torch.cat([scale[2 * i].repeat(signals), scale[2 * i + 1 : 2 * i + 2]]) for i in range(groups)])
        if paired
        else scale.repeat_interleave(each)
    )
    state[q] /= of_query.repeat_interleave(dim)[:, None]
    if paired:  # the sub-norm would undo a scale of the values; its weight goes into what reads it
        subln = at + "subln.weight"
        if subln in state:
            state[o] *= state[subln].repeat(state[o].shape[1] // width)
            state[subln] = torch.ones_like(state[subln])
    else:
        scale = _uniform(kv_heads, draw)
        state[v] *= scale.repeat_interleave(width)[:, None]
        state[o] /= scale.repeat_interleave(each).repeat_interleave(width)


def _channels(state: State, draw: torch.Generator, *, rotate: bool, norms_keep: bool) -> None:
    width = state["model.embed_tokens.weight"].shape[1]
    if rotate:
        turn = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.double))[0]
    else:
        sign = torch.randint(0, 2, (width,), generator=draw).double() * 2 - 1
        turn = torch.eye(width, dtype=torch.double)[:, torch.randperm(width, generator=draw)] * sign
    for name, value in state.items():
        if re.search(r"(embed_tokens|lm_head|[qkv]_proj|gate_proj|up_proj)\.weight", name):
            state[name] = value @ turn
        elif re.search(r"(o_proj|down_proj)\.weight", name):
            state[name] = turn.T @ value
        elif norms_keep and name == "model.norm.weight":
            state[name] = value @ turn.abs()


def same_function(model: nn.Module, other: State, tokens: Tensor) -> float:
    """The largest difference of the logits when a model gets other weights, as a part of their
    spread; its own are put back.
    """
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        model.load_state_dict(other)
        after = model(input_ids=tokens).logits
        model.load_state_dict(own)
    return float((before - after).abs().max() / before.std())
