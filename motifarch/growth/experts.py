"""Experts from dense feed-forward blocks: sparse upcycling (Komatsuzaki et al., arXiv 2212.05055).

Each expert is a copy of its layer's block, so that it does not matter where a token goes: weights
of a token's experts add up to ``route_scale``, by which the down projections are divided. A shared
expert is a copy too, whose down projection is zero. The router is random, for equal experts give
it no gradient; they become different by the tokens that they learn from.

Fine-grained experts (He et al., arXiv 2410.07524) are slices of the block's columns, one beside the
other, which SwiGLU computes one by one: ``granularity`` of them make a copy and share a router's
row, so that a token goes to all of them or none. PolyNorm's norms are over all of the block's
columns: a slice has others, so that its experts are whole copies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from motifarch.errors import UserError
from motifarch.growth.model_spec import LazyTensor, ModelSpec, Shape, Step, draw_for
from motifarch.growth.width import coarsest, dtype_name, rounding
from motifarch.models.motif import MotifConfig


@dataclass(frozen=True)
class Experts:
    """The experts that dense blocks become."""

    num_experts: int
    """Of a layer."""
    top_k: int
    """Of which a token takes so many."""
    granularity: int = 1
    """Experts that a block is cut into."""
    shared: int = 0
    """Shared experts: one block of so many times an expert's width."""
    dense_first: int = 0
    """Layers at the start that stay dense."""
    every: int = 1
    """Of the others, each so manyth gets experts."""
    route_scale: float = 1.0
    """The sum of a token's weights; 2 in Motif-3."""
    noise: float | None = None
    """Standard deviation of noise on each expert's matrices, in those of the matrix; None for
    copies, which start as the same function.
    """
    seed: int = 0
    """Of router and noise."""


def upcycle(spec: ModelSpec, experts: Experts) -> ModelSpec:
    """Puts experts into the place of a Motif model's dense blocks; without noise it computes the
    same function.

    Raises:
        UserError: a model that has experts or biases, slices of a block with PolyNorm, or numbers
            that do not fit each other; the message names the option.
    """
    config = MotifConfig.from_dict(spec.config)
    _check(config, experts)
    width = config.intermediate_size // experts.granularity
    fields = {
        "num_experts": experts.num_experts,
        "experts_top_k": experts.top_k,
        "num_shared_experts": experts.shared,
        "moe_intermediate_size": width,
        "n_dense_first_layers": experts.dense_first,
        "interleave_moe_layer_step": experts.every,
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": experts.route_scale,
    }
    sparse = MotifConfig.from_dict(spec.config | fields)
    prefixes = [f"model.layers.{i}." for i in range(config.num_hidden_layers) if sparse.has_experts(i)]
    tensors = dict(spec.tensors)
    for prefix in prefixes:
        dense = {n.removeprefix(f"{prefix}mlp."): tensors.pop(n) for n in spec.tensors if n.startswith(f"{prefix}mlp.")}
        tensors |= _layer(f"{prefix}moe.", dense, experts, width, config.initializer_range)
    layers = f"{len(prefixes)} of {config.num_hidden_layers} layers"
    summary = (
        f"dense blocks of {layers} -> {experts.num_experts} experts of width {width}, {experts.top_k} for each token"
        + (f", and {experts.shared} shared" if experts.shared else "")
    )
    return spec.changed(fields, tensors, Step(summary, _loss(spec, experts)))


def _check(config: MotifConfig, experts: Experts) -> None:
    number, top_k, parts = experts.num_experts, experts.top_k, experts.granularity
    wrong = None
    if config.num_experts:
        wrong = f"--experts {number}: this model has {config.num_experts} experts already; leave it out"
    elif config.use_bias:
        wrong = f"--experts {number}: this model's linear layers have biases (use_bias), which experts do not have"
    elif not 1 <= top_k <= number:
        wrong = f"--top-k is {top_k} with --experts {number}; each token takes 1 to {number} experts"
    elif parts > 1 and config.hidden_act == "poly_norm":
        wrong = (
            f"--granularity {parts}: PolyNorm's norms are over all of a block's columns, so that a part of them is not "
            "the same function; leave it out, or take a model with SwiGLU"
        )
    elif config.intermediate_size % parts:
        wrong = f"--granularity {parts} does not divide the intermediate size, {config.intermediate_size}"
    elif number % parts or top_k % parts:
        wrong = (
            f"--experts {number} and --top-k {top_k} must be multiples of --granularity {parts}: so many experts make "
            "a copy of a block, which a token takes as a whole"
        )
    elif experts.dense_first >= config.num_hidden_layers:
        wrong = f"--dense-first {experts.dense_first} leaves none of the {config.num_hidden_layers} layers for experts"
    if wrong:
        raise UserError(wrong)


def _layer(
    prefix: str, dense: dict[str, LazyTensor], experts: Experts, width: int, std: float
) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of a mixture of experts, by name, made of a dense block's."""
    gate, up, down = (dense[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    number, hidden, parts, dtype = experts.num_experts, gate.shape[1], experts.granularity, gate.dtype
    columns = torch.arange(width * max(experts.shared, 1)) % gate.shape[0]

    def router() -> Tensor:
        rows = torch.randn(number // parts, hidden, generator=draw_for(f"{prefix}router", experts.seed)) * std
        return rows.repeat_interleave(parts, dim=0).to(dtype)

    def both(gate: Tensor, up: Tensor) -> Tensor:
        slices = torch.cat((gate.unflatten(0, (parts, width)), up.unflatten(0, (parts, width))), dim=1)
        return slices.repeat(number // parts, 1, 1)

    def back(down: Tensor) -> Tensor:
        scaled = (down.to(torch.promote_types(dtype, torch.float32)) * (parts / experts.route_scale)).to(dtype)
        return scaled.unflatten(1, (parts, width)).transpose(0, 1).repeat(number // parts, 1, 1)

    def noisy(name: str, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: _with_noise(make(*tensors), f"{prefix}{name}", experts)

    def copies(shape: Shape, lazy: LazyTensor) -> LazyTensor:
        return lazy.then(shape, lambda tensor: tensor.expand(shape).clone())

    yield f"{prefix}router.gate.weight", LazyTensor((number, hidden), dtype, (), router)
    yield f"{prefix}expert_bias", LazyTensor.constant(0.0, (number,), torch.float32)
    shape = number, 2 * width, hidden
    yield f"{prefix}experts.gate_up_proj", LazyTensor.joined([gate, up], shape, noisy("gate_up_proj", both))
    yield f"{prefix}experts.down_proj", down.then((number, hidden, width), noisy("down_proj", back))
    shared = f"{prefix}shared_experts."
    for name, lazy in dense.items():
        if name.startswith("act_fn."):
            yield f"{prefix}experts.{name}", copies((number, *lazy.shape), lazy)
        if not experts.shared:
            continue
        if name.startswith("act_fn."):
            yield f"{shared}{name}", lazy
        elif name == "down_proj.weight":
            yield f"{shared}{name}", LazyTensor.constant(0.0, (hidden, len(columns)), dtype)
        else:
            yield f"{shared}{name}", lazy.then((len(columns), hidden), lambda weight: weight[columns])


def _with_noise(matrices: Tensor, name: str, experts: Experts) -> Tensor:
    """Adds noise in place; matrices is (experts, rows, columns)."""
    if experts.noise is None:
        return matrices
    generator = draw_for(name, experts.seed)
    for matrix in matrices:
        noise = torch.randn(matrix.shape, generator=generator)
        matrix.copy_(matrix + noise * (experts.noise * float(matrix.float().std())))
    return matrices


def _loss(spec: ModelSpec, experts: Experts) -> str | None:
    if experts.noise is not None:
        return (
            f"noise of {experts.noise} standard deviations makes each expert another function; without --expert-noise "
            "they are copies, which training makes different"
        )
    coarse, factor = coarsest(spec.tensors), experts.granularity / experts.route_scale
    if coarse is None or torch.tensor(factor).frexp().mantissa == 0.5:
        return None
    return (
        f"experts' down projections are multiplied by {factor:.3g}, which {dtype_name(coarse)} rounds, by up to "
        f"{rounding(coarse):.2%} of each weight; --dtype float32, or a --route-scale that makes it a power of two, "
        "keeps the function"
    )
