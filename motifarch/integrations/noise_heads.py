"""Differential attention inside a transformers attention module that goes on running its own
forward.

The module's query projection gains rows for noise heads behind its own, and its query norm a norm
for them; its rotary embeddings, cache, scale, window and softcap then serve all heads alike, and
the attention function that it calls is ours.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from motifarch.integrations.attention import IMPLEMENTATION
from motifarch.integrations.configuration import PatchOptions
from motifarch.integrations.derived import Derived, derive, linear_of
from motifarch.integrations.families import Forward
from motifarch.integrations.grouped_query import GroupedQueryAttention, plain_projections
from motifarch.integrations.latent import FromLatentAttention
from motifarch.integrations.layouts import attention_layout
from motifarch.layers.grouped_differential_attention import scalar_lambda
from motifarch.layers.head_norm import SubNorm

_cache: Any = functools.cache  # which mypy thinks has no use for these classes


class QueryNorm(nn.Module):
    """A host's query norm, and one like it for the noise heads, which come last.

    Args:
        signal: the host's.
        heads_dim: the dimension that counts heads where the norm sees them; -1 where it sees them
            side by side, and has a weight for each number of each.
        signal_heads: H.
        group: signal heads a noise head.
    """

    def __init__(self, signal: nn.Module, *, heads_dim: int, signal_heads: int, group: int) -> None:
        super().__init__()
        self.signal, self.noise = signal, copy.deepcopy(signal)
        self.heads_dim, self.signal_size = heads_dim, signal_heads
        if heads_dim == -1:
            for name, weight in signal.named_parameters():
                self.signal_size = len(weight)
                rows = weight.detach().unflatten(0, (signal_heads, -1))[::group].flatten()
                setattr(self.noise, name, nn.Parameter(rows.clone(), requires_grad=weight.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        signal, noise = x.tensor_split([self.signal_size], dim=self.heads_dim)
        return torch.cat((self.signal(signal), self.noise(noise)), dim=self.heads_dim)


class ScalarLambda(nn.Module):
    """GDA's lambda (arXiv 2510.06949), one number a layer: ``exp(lambda_q1 . lambda_k1) -
    exp(lambda_q2 . lambda_k2) + lambda_init``.

    A module of its own, so that adapters can name it.

    Args:
        head_dim: D, the vectors' length.
        lambda_init: the constant, at which lambda starts.
        device: where the parameters are made.
        dtype: their dtype.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        lambda_init: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.lambda_q1 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_k1 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_q2 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_k2 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts lambda at lambda_init to the bit: at zero vectors no gradient would move them."""
        for first, second in ((self.lambda_q1, self.lambda_q2), (self.lambda_k1, self.lambda_k2)):
            nn.init.normal_(first, std=0.1)
            second.copy_(first)

    def forward(self, _: Tensor) -> Tensor:
        """Lambda of any hidden states: a float32 (float64) scalar tensor."""
        return scalar_lambda(self)


class DifferentialAttentionMixin(Derived):
    """Mixed into a host's attention module: what the noise heads add to it.

    Lambda is that of :class:`ScalarLambda`, or ``sigmoid(x W)`` for each token and signal head
    (DIFF V2).
    """

    config: Any
    signal_heads: int
    noise_heads: int
    out_scale: float
    subln: SubNorm | None
    backend: str
    lambda_vectors: ScalarLambda | None
    lambda_proj: nn.Linear | None

    def compute_lambda(self, hidden_states: Tensor) -> Tensor:
        """Lambda in float32 (float64): a scalar tensor, or (B, S, H)."""
        if self.lambda_vectors is not None:
            return self.lambda_vectors(hidden_states)  # type: ignore[no-any-return]
        assert self.lambda_proj is not None
        logits = self.lambda_proj(hidden_states)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

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


@_cache
def differential_class(host: type) -> type:
    """The differential class of a host's attention class."""
    names = {"made_by": (differential_class, host), "__module__": __name__}
    return type(f"Differential{host.__name__}", (DifferentialAttentionMixin, host), names)


@_cache
def grouped_query_class(host: type) -> type:
    """The differential class of a host's attention class whose forward does not serve."""
    names = {"made_by": (grouped_query_class, host), "__module__": __name__}
    return type(f"Differential{host.__name__}", (DifferentialAttentionMixin, GroupedQueryAttention, host), names)


@_cache
def from_latent_class(host: type) -> type:
    """That of a host's latent attention class, which becomes grouped-query attention."""
    names = {"made_by": (from_latent_class, host), "__module__": __name__}
    return type(f"Differential{host.__name__}", (DifferentialAttentionMixin, FromLatentAttention, host), names)


def differential_module(module: nn.Module, forward: Forward) -> Any:
    """A host's attention module as one of its differential class, still without noise heads; one of
    latent attention still without projections.
    """
    layout = attention_layout(module)
    assert layout is not None
    if layout.latent:
        return derive(module, from_latent_class(type(module)))
    if forward.hands_on and not layout.fused:
        return derive(module, differential_class(type(module)))
    patched = derive(module, grouped_query_class(type(module)))
    plain_projections(patched, layout)
    return patched


def add_noise_heads(
    module: Any, options: PatchOptions, signal_heads: int, *, query: str, norm_heads_dim: int | None, backend: str
) -> None:
    """Give a differential module noise heads that start as their groups' first signal heads, and
    lambda at lambda_init or 1/2.

    Args:
        module: its query projection gives H heads.
        options: of the patch.
        signal_heads: H.
        query: name of the query projection.
        norm_heads_dim: see :class:`motifarch.integrations.families.Forward`.
        backend: of motif_kernels.
    """
    module.signal_heads, module.noise_heads = signal_heads, signal_heads // options.ratio
    module.backend, module.out_scale = backend, 1.0
    projection = getattr(module, query)
    new = {"device": projection.weight.device, "dtype": projection.weight.dtype}
    hidden_size, head_dim = projection.in_features, projection.out_features // signal_heads
    setattr(module, query, _with_noise_rows(projection, signal_heads, options.ratio))
    if norm_heads_dim is not None:
        norm = {"heads_dim": norm_heads_dim, "signal_heads": signal_heads, "group": options.ratio}
        module.q_norm = QueryNorm(module.q_norm, **norm)
    module.lambda_vectors = module.lambda_proj = None
    if options.attention == "diff_v2":
        module.lambda_proj = nn.Linear(hidden_size, signal_heads, bias=False, **new)
        nn.init.zeros_(module.lambda_proj.weight)
        # Lambda starts at 1/2, and A - A/2 would be half of what o_proj was trained on.
        module.out_scale = 1.0 if options.sub_norm else 2.0
    else:
        module.lambda_vectors = ScalarLambda(head_dim, lambda_init=options.lambda_init, **new)
        module.out_scale = 1.0 - options.lambda_init if options.sub_norm else 1.0
    module.subln = SubNorm(head_dim, eps=1e-5, **new) if options.sub_norm else None


def _with_noise_rows(query: nn.Linear, signal_heads: int, group: int) -> nn.Linear:
    """A projection of noise queries behind a host's queries: (..., E) -> (..., (H + Hn) D)."""

    def grown(tensor: Tensor) -> Tensor:
        heads = tensor.detach().unflatten(0, (signal_heads, -1))
        return torch.cat((heads, heads[::group])).flatten(0, 1)

    return linear_of(query, grown)
