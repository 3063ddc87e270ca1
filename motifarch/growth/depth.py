"""Depth: new blocks between the old ones, each of which starts as the identity (LLaMA-Pro, arXiv
2401.02415): it copies the one before it, with o_proj and down_proj zero.

A new block shifts the index of those after it, and with it ``lambda_init`` where that depends on
the index: in ``lambda = exp(q1 . k1) - exp(q2 . k2) + lambda_init`` and in the sub-norm's scale ``1
- lambda_init``. Both are made up for in the layer's own parameters: ``exp(q2 . k2)`` takes what the
constant gains (``exp(q1 . k1)`` where the other would not stay positive), and the sub-norm's weight
the ratio of the scales. In bfloat16 the vectors still hold their products (they are rounded
together), but the sub-norm's weight is rounded: the step says so. All tensors of a folder keep one
dtype, for ``from_pretrained`` would round the others to it.
"""

import re
from functools import partial

from torch import Tensor

from motifarch.errors import UserError
from motifarch.growth.lambdas import shift_lambda
from motifarch.growth.model_spec import LazyTensor, ModelSpec, Step
from motifarch.growth.width import coarsest, dtype_name, rounding
from motifarch.models.motif import MotifConfig
from motifarch.models.motif.decoder_layer import lambda_init_of

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SILENT = ("self_attn.o_proj.", "self_attn.wo.", "mlp.down_proj.")
_LAMBDAS = tuple(f"self_attn.lambda_{name}" for name in ("q1", "k1", "q2", "k2"))
_SUB_NORM = "self_attn.subln.weight"


def interleaved(old: int, new: int) -> list[tuple[int, bool]]:
    """Which old layer each layer of the deeper model copies, and whether it is new."""
    extra = new - old
    # The last of them comes after the last layer, as in LLaMA-Pro.
    after = [-(-(i + 1) * old // extra) - 1 for i in range(extra)]
    return [(i, fresh) for i in range(old) for fresh in (False, *[True] * after.count(i))]


def deepen(spec: ModelSpec, layers: int) -> ModelSpec:
    """Adds blocks that start as the identity, up to ``layers`` in all; a Motif model computes the
    same function.

    Raises:
        UserError: fewer layers than there are, or a model with experts, hyper-connections or
            windows in some of its layers.
    """
    config = MotifConfig.from_dict(spec.config)
    old = config.num_hidden_layers
    if layers < old:
        raise UserError(f"--layers is {layers}, but the model has {old}; a model can only grow")
    if layers == old:
        return spec
    kinds = {
        "experts": config.num_experts,
        "hyper-connections": config.mhc_enabled,
        "windows in some layers": config.sliding_window_period,
    }
    if found := [kind for kind, there in kinds.items() if there]:
        raise UserError(
            f"a model with {' and '.join(found)} does not grow in depth: its layers are not alike, or a new one would "
            "not be the identity; grow a plain one, and give it experts and hyper-connections after that"
        )
    parts: list[dict[str, LazyTensor]] = [{} for _ in range(old)]
    tensors = {}
    for name, lazy in spec.tensors.items():
        if match := _LAYER.fullmatch(name):
            parts[int(match[1])][match[2]] = lazy
        else:
            tensors[name] = lazy
    places = interleaved(old, layers)
    for i, (copied, new) in enumerate(places):
        layer = _moved(parts[copied], config, copied, i)
        if new:
            layer |= {
                name: LazyTensor.constant(0.0, lazy.shape, lazy.dtype)
                for name, lazy in layer.items()
                if name.startswith(_SILENT)
            }
        tensors |= {f"model.layers.{i}.{name}": lazy for name, lazy in layer.items()}
    fresh = [i for i, (_, new) in enumerate(places) if new]
    summary = f"num_hidden_layers {old} -> {layers}, new blocks {', '.join(map(str, fresh))} start as the identity"
    return spec.changed({"num_hidden_layers": layers}, tensors, Step(summary, _loss(spec, config)))


def _moved(layer: dict[str, LazyTensor], config: MotifConfig, old: int, new: int) -> dict[str, LazyTensor]:
    """The tensors of a layer at another index, where they compute what they did."""
    if _LAMBDAS[0] not in layer:
        return dict(layer)
    before, after = lambda_init_of(config, old), lambda_init_of(config, new)
    if before == after:
        return dict(layer)
    vectors = [layer[name] for name in _LAMBDAS]
    changed = {
        name: LazyTensor.joined(vectors, layer[name].shape, partial(_shifted, place=place, shift=before - after))
        for place, name in enumerate(_LAMBDAS)
    }
    if _SUB_NORM in layer:
        ratio = (1 - before) / (1 - after)
        changed[_SUB_NORM] = layer[_SUB_NORM].then(layer[_SUB_NORM].shape, lambda weight: weight * ratio)
    return layer | changed


def _shifted(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, *, place: int, shift: float) -> Tensor:
    return shift_lambda(q1, k1, q2, k2, shift)[place]


def _loss(spec: ModelSpec, config: MotifConfig) -> str | None:
    coarse = coarsest(spec.tensors)
    scaled = any(name.endswith(_SUB_NORM) for name in spec.tensors) and config.lambda_init is None
    if coarse is None or not scaled:
        return None
    return (
        f"a layer at another index has another lambda_init, for which its sub-norm's weight makes up: in "
        f"{dtype_name(coarse)} that is rounded, by up to {rounding(coarse):.2%} of each attention "
        f"output; --dtype float32 keeps the function"
    )
