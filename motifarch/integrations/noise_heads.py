"""Differential attention inside a transformers attention module that goes on running its own
forward.

The module's query projection and query norm gain noise heads behind its own; its rotary embeddings,
cache, scale, window and softcap then serve all of them alike, and the attention function that it
calls is ours.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from motifarch.integrations.attention import IMPLEMENTATION
from motifarch.integrations.configuration import PatchOptions
from motifarch.layers.grouped_differential_attention import scalar_lambda


class QueryProjection(nn.Linear):
    """A host's query projection, noise heads last: (..., E) -> (..., (H + Hn) D)."""

    noise: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Signal and noise queries, side by side."""
        return torch.cat((super().forward(x), self.noise(x)), dim=-1)


class QueryNorm:
    """Mixed into a host's query norm: noise heads, which come last, have their own norm."""

    noise: nn.Module
    heads_dim: int
    signal_heads: int

    def forward(self, x: Tensor) -> Tensor:
        """Same shape; dimension ``heads_dim`` counts heads."""
        signal, noise = x.tensor_split([self.signal_heads], dim=self.heads_dim)
        host: Any = super()
        return torch.cat((host.forward(signal), self.noise(noise)), dim=self.heads_dim)


class DifferentialAttentionMixin:
    """Mixed into a host's attention module: what the noise heads add to it.

    Lambda is one number a layer, ``exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) +
    lambda_init`` (GDA, arXiv 2510.06949), or ``sigmoid(x W)`` for each token and signal head
    (DIFF V2).
    """

    config: Any
    q_proj: QueryProjection
    signal_heads: int
    noise_heads: int
    lambda_init: float
    out_scale: float
    subln: nn.RMSNorm | None
    backend: str

    def compute_lambda(self, hidden_states: Tensor) -> Tensor:
        """Lambda in float32 (float64): a scalar tensor, or (B, S, H)."""
        host: Any = self
        if hasattr(host, "lambda_proj"):
            logits = host.lambda_proj(hidden_states)
            return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return scalar_lambda(host)

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        """The host's forward, with lambda handed through to the attention function.

        Raises:
            ValueError: the model was set to another attention implementation.
        """
        if self.config._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"attn_implementation is {self.config._attn_implementation!r}, but this model's attention was patched: "
                f"model.set_attn_implementation({IMPLEMENTATION!r}) is the only one that serves it"
            )
        lam = self.compute_lambda(hidden_states)
        host: Any = super()
        return host.forward(hidden_states, *arguments, differential_lambda=lam, **options)

    @torch.no_grad()
    def reset_noise(self) -> None:
        """Starts noise heads as their groups' first signal heads, lambda at lambda_init or 1/2."""
        host: Any = self
        group = self.signal_heads // self.noise_heads
        for name, tensor in self.q_proj.noise.named_parameters():
            heads = getattr(self.q_proj, name).unflatten(0, (self.signal_heads, -1))
            tensor.copy_(heads[::group].flatten(0, 1))
        if hasattr(host, "lambda_proj"):
            nn.init.zeros_(host.lambda_proj.weight)
            return
        # Equal pairs start lambda at lambda_init to the bit; at zero no gradient would move them.
        for first, second in ((host.lambda_q1, host.lambda_q2), (host.lambda_k1, host.lambda_k2)):
            nn.init.normal_(first, std=0.1)
            second.copy_(first)


def add_noise_heads(
    module: Any,
    options: PatchOptions,
    signal_heads: int,
    *,
    norm_heads_dim: int | None,
    backend: str,
    base: type | None = None,
) -> None:
    """Turn a host's attention module, whose q_proj gives H = ``signal_heads`` heads, in place, into
    a differential one; the forward of ``base``, if any, runs instead of the host's.

    For ``norm_heads_dim`` see :class:`motifarch.integrations.families.Family`.
    """
    noise_heads, head_dim = signal_heads // options.ratio, module.head_dim
    query = module.q_proj
    hidden_size, new = query.in_features, {"device": query.weight.device, "dtype": query.weight.dtype}
    query.__class__ = QueryProjection
    query.out_features += noise_heads * head_dim
    query.noise = nn.Linear(hidden_size, noise_heads * head_dim, bias=query.bias is not None, **new)
    if norm_heads_dim is not None:
        norm = module.q_norm
        noise_norm = copy.deepcopy(norm)
        norm.__class__ = type(f"{type(norm).__name__}WithNoise", (QueryNorm, type(norm)), {})
        norm.noise, norm.heads_dim, norm.signal_heads = noise_norm, norm_heads_dim, signal_heads
    module.signal_heads, module.noise_heads = signal_heads, noise_heads
    module.lambda_init, module.backend, module.out_scale = options.lambda_init, backend, 1.0
    if options.attention == "gda":
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(module, name, nn.Parameter(torch.empty(head_dim, **new)))
        module.out_scale = 1.0 - options.lambda_init if options.sub_norm else 1.0
    else:
        module.lambda_proj = nn.Linear(hidden_size, signal_heads, bias=False, **new)
        # Lambda starts at 1/2, and A - A/2 would be half of what o_proj was trained on.
        module.out_scale = 1.0 if options.sub_norm else 2.0
    module.subln = nn.RMSNorm(head_dim, eps=1e-5, **new) if options.sub_norm else None
    bases = (DifferentialAttentionMixin, *(() if base is None else (base,)), type(module))
    module.__class__ = type(f"Differential{type(module).__name__}", bases, {})
    module.reset_noise()
