"""Hyper-connections (mHC, arXiv 2512.24880) around the sublayers of a pre-norm model, which start
as the plain residual stream that they replace.

All streams are equal then and stay so: the gate ``pre`` takes their mean, H is doubly stochastic,
and ``post`` is ``(1 + alpha) sigmoid(0)``, which is 1 with alpha 1. Training may anneal alpha to 0
after that, as Motif-3's did.
"""

import math
import re

import torch

from motifarch.errors import UserError
from motifarch.growth.model_spec import LazyTensor, ModelSpec, Shape, Step, draw_for
from motifarch.layers import HyperConnections
from motifarch.models.motif import MotifConfig

_NORM = re.compile(r"model\.layers\.(\d+)\.(input|post_attention)_layernorm\.weight")
_BLOCKS = {"input": "mhc_attn", "post_attention": "mhc_ffn"}


def add_hyper_connections(spec: ModelSpec, streams: int = 4) -> ModelSpec:
    """Gives a Motif model so many residual streams; it computes the same function.

    Raises:
        UserError: fewer than two streams, or a model that has hyper-connections.
    """
    config = MotifConfig.from_dict(spec.config)
    if config.mhc_enabled:
        raise UserError(f"--streams {streams}: this model has hyper-connections already; leave it out")
    if streams < 2:
        raise UserError(f"--streams is {streams}; hyper-connections mix two streams or more, 4 in Motif-3")
    with torch.device("meta"):
        state = HyperConnections(config.hidden_size, num_streams=streams).state_dict()
    tensors = {}
    for name, lazy in spec.tensors.items():
        tensors[name] = lazy
        if match := _NORM.fullmatch(name):
            prefix = f"model.layers.{match[1]}.{_BLOCKS[match[2]]}."
            for field, tensor in state.items():
                tensors[prefix + field] = _initial(prefix + field, tuple(tensor.shape), lazy.dtype)
    fields = {
        "mhc_enabled": True,
        "mhc_expansion_rate": streams,
        "mhc_identity_init": True,
        "mhc_h_post_alpha_end": 1.0,
    }
    step = Step(f"residual stream -> {streams} streams of hyper-connections that start as the identity")
    return spec.changed(fields, tensors, step)


def _initial(name: str, shape: Shape, dtype: torch.dtype) -> LazyTensor:
    """As ``HyperConnections`` starts with ``identity_init``."""
    field = name.split(".mhc_")[1].split(".", 1)[1]
    if field.startswith("proj"):  # Xavier's; alphas of 0 multiply them
        bound = math.sqrt(6 / sum(shape))
        return LazyTensor(
            shape, dtype, (), lambda: torch.empty(shape).uniform_(-bound, bound, generator=draw_for(name, 0)).to(dtype)
        )
    if field == "bias_res":
        return LazyTensor(shape, dtype, (), lambda: (torch.eye(shape[0]) * 10 - 10).to(dtype))
    if field == "bias_pre":  # rounding it scales all of a sublayer's input, which its norm takes away again
        return LazyTensor.constant(-math.log(shape[0] - 1), shape, dtype)
    return LazyTensor.constant(1.0 if field == "rms_norm.weight" else 0.0, shape, dtype)
