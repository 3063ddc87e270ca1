"""A softmax model becomes a differential one that computes the same function, to be trained on.

What is new starts where it changes nothing, and with a gradient:

- DIFF V2: each noise query is a copy of its signal query, so that both maps are equal; lambda is
  1/2 everywhere (W_lambda is zero), which leaves half of the output, and o_proj is doubled.
- GDA without pairs of keys and without a sub-norm: lambda is ``exp(0) - exp(0) + 0 = 0``. lambda_q1
  and lambda_q2 are zero and lambda_k1 and lambda_k2 are not, for zeros on both sides would have no
  gradient. A group's noise query is the mean of its signal queries. They share their key head, so
  that its map is the geometric mean of theirs, normalised: what the group's heads have in common,
  which is what the difference is to take away. (With norms of queries this holds but for the norm.)
  For groups of one it is DIFF V2's copy.
- GDLA, from latent attention: as DIFF V2, for its lambda is a sigmoid as well. So is its output
  gate, where the source has none: 1/2 everywhere, for which wo makes up too. Latents and the
  cache stay; each signal head keeps its own key and value.

A sub-norm, and DIFF V2 or GDLA with groups of several signal heads, cannot start as the same
function: these are refused unless an approximation is asked for.
"""

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from motifarch.errors import UserError
from motifarch.growth.from_softmax_sources import as_motif
from motifarch.growth.model_spec import LazyTensor, ModelSpec, Step
from motifarch.models.motif import MotifConfig, MotifForCausalLM

Kind = Literal["diff_v2", "gda", "gdla", "mla"]

_IN_ATTENTION = re.compile(r"model\.(mtp_)?layers\.(\d+)\.self_attn\.(.+)")
_QUERIES, _OUTPUT = ("q_proj.weight", "q_proj.bias", "wq_b.weight"), ("o_proj.weight", "wo.weight")
_LAMBDA_STD = 0.1
"""Of lambda_k1 and lambda_k2, as in a model from scratch (arXiv 2410.05258)."""


def from_softmax(
    spec: ModelSpec,
    to: Kind,
    *,
    ratio: int | None = None,
    sub_norm: bool = False,
    approximate: bool = False,
    gains: Tensor | None = None,
    seed: int = 0,
) -> ModelSpec:
    """The differential model that a softmax model becomes.

    Args:
        spec: of a softmax model, as :func:`motifarch.growth.from_softmax_sources.as_motif`
            takes it.
        to: "diff_v2" or "gda"; of a model with latent attention "gdla", or "mla" for the Motif
            model that it is.
        ratio: signal heads for each noise head; default 1, but for "gda" as many as share a
            key/value head.
        sub_norm: normalise each head's output, as the papers on DIFF V1 and GDA do; never exact.
        approximate: allow what is not exact.
        gains: (layers, heads), what o_proj's columns of each head are multiplied by; default 2 for
            DIFF V2 without a sub-norm and GDLA, twice that for a new gate, else 1.
            :func:`motifarch.growth.from_softmax_probe.closest` measures those for a sub-norm.
        seed: of lambda_k1 and lambda_k2.

    Returns:
        A spec of a Motif folder, whose last step says what is lost, if anything is.

    Raises:
        UserError: a source that as_motif refuses, heads that do not divide, or a result that would
            not be exact while ``approximate`` is off.
    """
    base = as_motif(spec)
    before = MotifConfig.from_dict(base.config)
    if before.is_latent != (to in ("gdla", "mla")):
        raise UserError(
            f"--to {to} does not go with this model's attention: one with latents (attention_type 'mla') becomes gdla, "
            "others gda or diff_v2"
        )
    if to == "mla":
        if base is spec:
            raise UserError("--to mla makes a Motif model of another family's, as it is; this is one already")
        if ratio is not None or sub_norm or approximate:
            raise UserError(
                "--ratio, --sub-norm and --approximate have no meaning with --to mla, which has no noise heads; leave "
                "them out"
            )
        return base
    if to == "gdla" and sub_norm:
        raise UserError("--sub-norm does not go with --to gdla, which has no such norm; leave it out")
    heads, kv_heads = before.num_attention_heads, before.num_key_value_heads
    ratio = _ratio(heads, heads if kv_heads is None else kv_heads, to, ratio)
    loss = _loss(to, ratio, sub_norm)
    if loss is not None and not approximate:
        raise UserError(f"{loss}; --approximate takes the closest model and reports how far it is")
    noise = heads // ratio
    fields = {
        "attention_type": to,
        "num_attention_heads": heads + noise,
        "num_noise_heads": noise,
        # Where the source's config leaves these out, they follow from its number of heads.
        "num_key_value_heads": kv_heads,
        "head_dim": before.head_dim,
        "sub_norm": sub_norm,
    }
    gated = before.attention_gate
    if to == "gdla":
        del fields["sub_norm"]
        fields |= {"attention_gate": True, "elementwise_attn_output_gate": True}
    if to == "gda":
        fields |= {"paired_kv": False, "lambda_init": 0.0, "lambda_init_depth_offset": None}
    config = MotifConfig.from_dict(base.config | fields)
    if gains is None:
        # Twice the difference is the signal where lambda is 1/2, and twice the gated one where the
        # gate is; a sub-norm gives it a size of its own.
        gain = 1.0 if to == "gda" or sub_norm else 2.0 if to == "diff_v2" or gated else 4.0
        gains = torch.full((config.num_hidden_layers, heads), gain)
    summary = f"softmax attention -> {to}: {heads} signal and {noise} noise heads over {kv_heads} key/value heads"
    # Code that came with the old layout does not fit the new one.
    kept = {name: value for name, value in base.config.items() if name != "auto_map"}
    tensors = dict(_tensors(base, config, gains, seed))
    return ModelSpec(kept | fields, tensors, (*base.steps, Step(summary, loss)))


def _ratio(heads: int, kv_heads: int, to: Kind, ratio: int | None) -> int:
    shared = heads // kv_heads
    if ratio is None:
        return shared if to == "gda" else 1
    if ratio < 1 or shared % ratio:
        fitting = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
        raise UserError(
            f"--ratio is {ratio}, but the signal heads of a group share a key/value head, and each of the {kv_heads} "
            f"serves {shared} of the {heads} heads; it may be {fitting}"
        )
    return ratio


def _loss(to: Kind, ratio: int, sub_norm: bool) -> str | None:
    """Why the conversion is not exact, or None."""
    if sub_norm:
        return (
            "a sub-norm rescales every head's output at every token by its own size, which softmax attention does "
            "not: the model cannot start as the same function; it can without a sub-norm"
        )
    if to != "gda" and ratio > 1:
        other = ", or with --to gda, whose lambda starts at 0" if to == "diff_v2" else ""
        return (
            f"with --ratio {ratio} a noise query cannot be a copy of all {ratio} signal queries of its group, and "
            f"lambda starts at 1/2: the model cannot start as the same function; it can with --ratio 1{other}"
        )
    return None


def _tensors(base: ModelSpec, config: MotifConfig, gains: Tensor, seed: int) -> Iterator[tuple[str, LazyTensor]]:
    """The differential model's tensors, by name, made of the softmax model's."""
    given = base.tensors
    with torch.device("meta"):
        state = MotifForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    draw = torch.Generator().manual_seed(seed)
    dtype = given["model.embed_tokens.weight"].dtype
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        match = _IN_ATTENTION.fullmatch(name)
        # A layer of multi-token prediction takes the last layer's gains.
        layer, field = (-1 if match[1] else int(match[2]), match[3]) if match else (0, "")
        if field in _QUERIES:
            yield name, _with_noise(given[name], shape, config.noise_heads, gains.shape[1])
        elif field in _OUTPUT:
            yield name, _scaled(given[name], gains[layer])
        elif name in given:
            yield name, given[name]
        elif field in ("lambda_k1", "lambda_k2"):
            values = (torch.randn(shape, generator=draw) * _LAMBDA_STD).to(dtype)
            yield name, LazyTensor(shape, dtype, (), values.clone)
        else:  # lambda_q1, lambda_q2, lambda_proj, wq_b_gate; a sub-norm's weight
            yield name, LazyTensor.constant(1.0 if field == "subln.weight" else 0.0, shape, dtype)


def _with_noise(queries: LazyTensor, shape: tuple[int, ...], noise_heads: int, heads: int) -> LazyTensor:
    """Rows of query heads, and behind those of each group their mean as the noise head's."""

    def add(tensor: Tensor) -> Tensor:
        groups = tensor.view(noise_heads, heads // noise_heads, -1, *tensor.shape[1:])
        mean = groups.mean(dim=1, keepdim=True, dtype=torch.promote_types(tensor.dtype, torch.float32))
        return torch.cat([groups, mean.to(tensor.dtype)], dim=1).view(shape)

    return queries.then(shape, add)


def _scaled(output: LazyTensor, factors: Tensor) -> LazyTensor:
    """o_proj with each head's columns multiplied by that head's factor."""

    def scale(weight: Tensor) -> Tensor:
        columns = factors.repeat_interleave(weight.shape[1] // len(factors))
        return (weight * columns.to(torch.promote_types(weight.dtype, torch.float32))).to(weight.dtype)

    return output.then(output.shape, scale)
