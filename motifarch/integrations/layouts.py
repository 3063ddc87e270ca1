"""Attention and feed-forward modules of transformers, known by the projections that they have."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AttentionLayout:
    """Names of an attention module's projections.

    Args:
        projections: those of queries, keys and values; or the one that gives all three, in this
            order; or that of latents.
        latent: keys and values come from a latent (multi-head latent attention).
    """

    projections: tuple[str, ...]
    latent: bool = False

    @property
    def fused(self) -> bool:
        """One projection gives queries, keys and values."""
        return len(self.projections) == 1 and not self.latent

    @property
    def split(self) -> tuple[str, ...]:
        """Names of the three projections that a patched module has."""
        return self.projections if len(self.projections) == 3 else ("q_proj", "k_proj", "v_proj")


ATTENTION = (
    AttentionLayout(("kv_a_proj_with_mqa",), latent=True),
    AttentionLayout(("q_proj", "k_proj", "v_proj")),
    AttentionLayout(("query", "key", "value")),
    AttentionLayout(("qkv_proj",)),
    AttentionLayout(("Wqkv",)),
)
OUTPUTS = ("o_proj", "out_proj", "Wo")


@dataclass(frozen=True)
class FeedForwardLayout:
    """Names of a feed-forward module's parts: ``output(activation(gate) * up)``, or
    ``output(activation(up))``.

    Args:
        inputs: the projections of gate and up; the one that gives both, in this order; or that of
            up.
        output: the last projection.
        activation: the activation.
        gated: there is a gate.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str
    gated: bool = True


FEED_FORWARD = (
    FeedForwardLayout(("gate_proj", "up_proj"), "down_proj", "act_fn"),
    FeedForwardLayout(("gate_up_proj",), "down_proj", "activation_fn"),
    FeedForwardLayout(("Wi",), "Wo", "act"),
    FeedForwardLayout(("up_proj",), "down_proj", "act_fn", gated=False),
    FeedForwardLayout(("fc1",), "fc2", "activation_fn", gated=False),
)


def attention_layout(module: nn.Module) -> AttentionLayout | None:
    """The layout of an attention module; None for any other module."""
    if _head_dim(module) is None:
        return None
    return next((layout for layout in ATTENTION if _has(module, layout.projections)), None)


def feed_forward_layout(module: nn.Module) -> FeedForwardLayout | None:
    """The layout of a feed-forward module; None for any other module."""
    named = ((layout, (*layout.inputs, layout.output)) for layout in FEED_FORWARD)
    return next((layout for layout, names in named if _has(module, names) and hasattr(module, layout.activation)), None)


def is_experts(module: nn.Module) -> bool:
    """Whether it has the weights of routed experts, all in one."""
    return all(getattr(getattr(module, n, None), "ndim", 0) == 3 for n in ("gate_up_proj", "down_proj"))


def is_unknown_attention(module: nn.Module) -> bool:
    """Whether a module calls itself attention and projects, but has no layout of the above."""
    projects = any(isinstance(child, nn.Linear) for child in module.children())
    return "Attention" in type(module).__name__ and projects and attention_layout(module) is None


def head_dim(module: nn.Module) -> int:
    """D of a module that has a layout: of a latent one, that of its values."""
    width = _head_dim(module)
    assert width is not None
    return width


def head_counts(module: Any) -> tuple[int, int]:
    """H, and Hk: of latent attention as many, for there is a key of its own for each head."""
    layout, width = attention_layout(module), head_dim(module)
    assert layout is not None
    if layout.latent:
        return int(module.num_heads), int(module.num_heads)
    query, *others = (getattr(module, name).out_features // width for name in layout.projections)
    if others:
        return query, others[0]
    heads = int(module.config.num_attention_heads)
    return heads, (query - heads) // 2


def output_name(module: nn.Module) -> str | None:
    """Name of the output projection; None where another module has it."""
    return next((name for name in OUTPUTS if _has(module, (name,))), None)


def _head_dim(module: nn.Module) -> int | None:
    names = ("v_head_dim", "head_dim", "attention_head_size")
    return next((int(getattr(module, n)) for n in names if isinstance(getattr(module, n, None), int)), None)


def _has(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)
