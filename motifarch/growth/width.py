"""Width and heads: every unit of a layer is copied, and what reads the copies divides by their
number.

Width by whole multiples is HyperCloning (Samragh et al., arXiv 2409.12903). Multiplying signal
heads alone is how Motif-2-12.7B's grouped differential attention was grown (arXiv 2511.07464,
2510.06949).

The axes of a Motif model's tensors lie in a few spaces (the residual stream, a block's feed-forward
units, its query heads ...). A tensor that writes into a space that grows repeats its rows; one that
reads from it repeats its columns and divides by the copies. RMS norms and PolyNorm are means over a
space in which every place has as many copies as any other: they don't change.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from motifarch.errors import UserError
from motifarch.growth.model_spec import LazyTensor, ModelSpec, Step, draw_for
from motifarch.models.motif import MotifConfig

HIDDEN, FEED_FORWARD = "hidden", "feed_forward"
QUERIES, KEYS = "queries", "keys"  # outputs of q_proj, and of k_proj and v_proj
SIGNALS, SIGNAL_HEADS = "signals", "signal_heads"  # what signal heads put out, and one number for each of them

# Of each linear layer, the space that it writes into and the space that it reads.
_LINEAR: dict[str, tuple[str | None, str]] = {
    "lm_head": (None, HIDDEN),
    "self_attn.q_proj": (QUERIES, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, SIGNALS),
    "self_attn.lambda_proj": (SIGNAL_HEADS, HIDDEN),
    "self_attn.gate_proj": (SIGNALS, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
# The space of each row or column of the others; the rest belongs to none that grows.
_OTHERS: dict[str, tuple[str | None, ...]] = {
    "model.embed_tokens.weight": (None, HIDDEN),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "model.norm.weight": (HIDDEN,),
}
_IN_LAYER = re.compile(r"model\.layers\.\d+\.")

_NOISE_ELEMENTS = 2**22
"""Numbers of noise that are drawn at a time."""


@dataclass(frozen=True)
class Copies:
    """How a space grows."""

    index: Tensor
    """(new size,), int64: the old place that each new one copies."""
    times: int
    """Copies of each place, in spaces that are read."""


@dataclass(frozen=True)
class Noise:
    """Noise that makes copies differ for training and cancels in what they compute."""

    scale: float
    """Its standard deviation, in those of the tensor that it is added to."""
    seed: int = 0


def tiled(size: int, times: int) -> Copies:
    """A space repeated as a whole: 0 1 2 0 1 2."""
    return Copies(torch.arange(size).repeat(times), times)


def head_copies(config: MotifConfig, *, heads: int, signal_heads: int) -> dict[str, Copies]:
    """How the spaces of an attention layer grow; the factors are those of :func:`widen`.

    Query heads lie as blocks of [g signal heads, 1 noise head], one block for each noise head, and
    all heads of a block read one key/value head (or pair). A block's signal heads are therefore
    repeated within it, and blocks and key/value heads are repeated as a whole.
    """
    assert config.head_dim is not None  # filled in by the config
    assert config.num_key_value_heads is not None
    blocks = config.noise_heads or config.num_attention_heads
    group = config.num_attention_heads // blocks - (1 if config.noise_heads else 0)

    def signals(width: int) -> Copies:
        index = torch.arange(blocks * group * width).view(blocks, group, width)
        return Copies(index.repeat(heads, signal_heads, 1).flatten(), heads * signal_heads)

    assert config.v_head_dim is not None  # filled in by the config
    queries = torch.arange(config.num_attention_heads * config.head_dim).view(blocks, -1, config.head_dim)
    queries = torch.cat([queries[:, :group].repeat(1, signal_heads, 1), queries[:, group:]], dim=1)
    return {
        QUERIES: Copies(queries.repeat(heads, 1, 1).flatten(), heads),
        KEYS: tiled(config.num_key_value_heads * config.head_dim, heads),
        SIGNALS: signals(config.v_head_dim),
        SIGNAL_HEADS: signals(1),
    }


def widen(
    spec: ModelSpec,
    *,
    hidden: int = 1,
    feed_forward: int = 1,
    heads: int = 1,
    signal_heads: int = 1,
    noise: Noise | None = None,
) -> ModelSpec:
    """Multiplies widths and heads by whole numbers; the model computes the same function.

    The embedding repeats its columns, so that the residual stream holds each number ``hidden``
    times. A tied embedding stays tied: the final norm's weight is divided by ``hidden``, because
    the embedding can't be, being read and written alike.

    Args:
        spec: of a Motif model.
        hidden: multiplies hidden_size.
        feed_forward: multiplies intermediate_size.
        heads: multiplies all heads: signal, noise and key/value.
        signal_heads: multiplies the signal heads of each group, and leaves noise and key/value
            heads as they are.
        noise: added to the weights that read copies, so that it cancels; None adds none. A tied
            output projection gets none.

    Raises:
        UserError: a factor below 1, signal heads of a model that has no noise heads, noise where
            nothing is copied, or a model with latent attention, experts, hyper-connections or
            multi-token prediction.
    """
    factors = {"hidden": hidden, "feed_forward": feed_forward, "heads": heads, "signal_heads": signal_heads}
    for name, factor in factors.items():
        if factor < 1:
            raise UserError(f"--{name.replace('_', '-')} is {factor}; give a whole multiple, at least 1")
    if noise is not None and not (math.isfinite(noise.scale) and noise.scale > 0):
        raise UserError(f"--noise is {noise.scale}; give a positive number of standard deviations, such as 0.01")
    if all(factor == 1 for factor in factors.values()):
        if noise is not None:
            raise UserError("--noise has nothing to tell apart: give a factor that copies units, or leave it out")
        return spec
    config = MotifConfig.from_dict(spec.config)
    parts = {
        f"attention_type {config.attention_type!r}": config.is_latent,
        "experts": config.num_experts,
        "hyper-connections": config.mhc_enabled,
        "multi-token prediction": config.num_nextn_predict_layers,
    }
    if found := [part for part, there in parts.items() if there]:
        raise UserError(
            f"a model with {' and '.join(found)} does not grow in width; grow a plain one, and give it experts and "
            "hyper-connections after that"
        )
    if signal_heads > 1 and not config.noise_heads:
        raise UserError(
            f"--signal-heads {signal_heads}: this model's attention_type is {config.attention_type!r}, which has no "
            "noise heads apart from which signal heads could grow; multiply all heads with --heads"
        )
    copies = head_copies(config, heads=heads, signal_heads=signal_heads) | {
        HIDDEN: tiled(config.hidden_size, hidden),
        FEED_FORWARD: tiled(config.intermediate_size, feed_forward),
    }
    # A space that does not grow needs no work.
    copies = {space: c for space, c in copies.items() if not torch.equal(c.index, torch.arange(len(c.index)))}
    tensors = {name: _grown(name, lazy, copies, noise) for name, lazy in spec.tensors.items()}
    if config.tie_word_embeddings and hidden > 1:
        final = tensors["model.norm.weight"]
        tensors["model.norm.weight"] = final.then(final.shape, lambda weight: weight / hidden)
    fields = _config_fields(config, factors)
    return spec.changed(fields, tensors, _step(spec, config, fields, factors, noise))


def untie(spec: ModelSpec) -> ModelSpec:
    """Gives the output projection a matrix of its own, equal to the embedding."""
    if not spec.config.get("tie_word_embeddings"):
        return spec
    tensors = spec.tensors | {"lm_head.weight": spec.tensors["model.embed_tokens.weight"]}
    step = Step("output projection: tied to the embedding -> a copy of it")
    return spec.changed({"tie_word_embeddings": False}, tensors, step)


def _axes(name: str) -> tuple[tuple[str | None, ...], int | None]:
    """The space of each dimension of a tensor, and which dimension is read."""
    place = _IN_LAYER.sub("", name)
    module, _, kind = place.rpartition(".")
    if module in _LINEAR:
        write, read = _LINEAR[module]
        return ((write, read), 1) if kind == "weight" else ((write,), None)
    return _OTHERS.get(place, ()), None


def _grown(name: str, lazy: LazyTensor, copies: dict[str, Copies], noise: Noise | None) -> LazyTensor:
    axes, read = _axes(name)
    chosen = {dim: copies[space] for dim, space in enumerate(axes) if space in copies}
    if not chosen:
        return lazy
    shape = tuple(len(chosen[dim].index) if dim in chosen else size for dim, size in enumerate(lazy.shape))
    grown = lazy.then(shape, partial(_copy, chosen=chosen, read=read))
    if noise is None or read not in chosen or chosen[read].times == 1:
        return grown
    draw = partial(draw_for, name, noise.seed)
    return grown.then(shape, partial(_add_noise, copies=chosen[read], scale=noise.scale, draw=draw))


def _copy(tensor: Tensor, *, chosen: dict[int, Copies], read: int | None) -> Tensor:
    for dim, copies in chosen.items():
        tensor = tensor.index_select(dim, copies.index)
        if dim == read:
            tensor = tensor.div_(copies.times)
    return tensor


def _add_noise(weight: Tensor, *, copies: Copies, scale: float, draw: Callable[[], torch.Generator]) -> Tensor:
    """Adds noise in place that sums to 0 over a column's copies; weight is (rows, columns)."""
    generator = draw()
    # Without its mean over the copies, noise is smaller by this much.
    std = float(weight.std()) * scale * math.sqrt(copies.times / (copies.times - 1))
    old, dtype = weight.shape[1] // copies.times, torch.promote_types(weight.dtype, torch.float32)
    for rows in weight.split(max(1, _NOISE_ELEMENTS // weight.shape[1])):
        noise = torch.randn(rows.shape, generator=generator).to(dtype) * std
        mean = noise.new_zeros(len(rows), old).index_add_(1, copies.index, noise).div_(copies.times)
        noise -= mean.index_select(1, copies.index)
        rows.copy_(rows + noise)
    return weight


def _config_fields(config: MotifConfig, factors: dict[str, int]) -> dict[str, object]:
    """The config fields that change, or that would be derived from those that do."""
    assert config.num_key_value_heads is not None
    noise_heads = config.noise_heads * factors["heads"]
    signal = (config.num_attention_heads - config.noise_heads) * factors["heads"] * factors["signal_heads"]
    fields: dict[str, object] = {
        "hidden_size": config.hidden_size * factors["hidden"],
        "intermediate_size": config.intermediate_size * factors["feed_forward"],
        "num_attention_heads": signal + noise_heads,
        "num_key_value_heads": config.num_key_value_heads * factors["heads"],
        "head_dim": config.head_dim,
    }
    if config.noise_heads:
        fields["num_noise_heads"] = noise_heads
    if config.attention_type == "diff_v1" and factors["signal_heads"] > 1:
        fields["attention_type"] = "gda"  # DIFF V1 has one signal head for each noise head
        if config.lambda_init is None and config.lambda_init_depth_offset is None:
            fields["lambda_init_depth_offset"] = 0  # DIFF V1's count of depth, which is not GDA's
    return fields


def _step(
    spec: ModelSpec, config: MotifConfig, fields: dict[str, object], factors: dict[str, int], noise: Noise | None
) -> Step:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_noise_heads", "num_key_value_heads")
    old = {name: getattr(config, name) for name in names} | {"num_noise_heads": config.noise_heads}
    changes = [f"{name} {old[name]} -> {fields[name]}" for name in names if fields.get(name, old[name]) != old[name]]
    if fields.get("attention_type"):
        changes.append(f"attention_type {config.attention_type} -> {fields['attention_type']}")
    if noise is not None:
        changes.append(f"noise of {noise.scale} standard deviations that cancels (seed {noise.seed})")
    return Step(", ".join(changes), _loss(spec, factors, noise))


def _loss(spec: ModelSpec, factors: dict[str, int], noise: Noise | None) -> str | None:
    coarse = coarsest(spec.tensors)
    if coarse is None:
        return None
    divisors = {factors["hidden"], factors["feed_forward"], factors["heads"] * factors["signal_heads"]}
    odd = sorted(d for d in divisors if d & (d - 1))
    reasons = [f"no exact {' or '.join(f'1/{d}' for d in odd)} of a weight"] if odd else []
    if noise is not None:
        reasons.append("no room for noise that cancels exactly")
    if not reasons:
        return None
    return (
        f"{dtype_name(coarse)} has {' and '.join(reasons)}: each weight that reads copies is rounded, by up to "
        f"{rounding(coarse):.2%} of itself; --dtype float32 keeps the function"
    )


def coarsest(tensors: dict[str, LazyTensor]) -> torch.dtype | None:
    """The dtype with the fewest digits among the weights, if it has fewer than float32."""
    dtypes = {lazy.dtype for lazy in tensors.values()}
    dtype = max(dtypes, key=lambda d: torch.finfo(d).eps)
    return dtype if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps else None


def dtype_name(dtype: torch.dtype) -> str:
    """As configs have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of a number rounded to a dtype."""
    return torch.finfo(dtype).eps / 2
