"""The models that benchmarks compare: ours and those of transformers, made equal where they can be.

All have one hidden size, number of layers, head width and vocabulary, embeddings tied in all or in
none, and no biases; the width of the feed-forward block is what is left to make the numbers of
parameters equal. The heads are what a fair user would choose, H = hidden_size / head_dim:

- Llama and the softmax baseline: H query heads and as many key/value heads. Llama comes with each
  attention that it can be given: torch's own choice, cuDNN's through torch, and each generation of
  flash-attn that is installed.
- DiffLlama and DIFF V1: H query heads, which are H/2 pairs of signal and noise, over H key/value
  heads. Their projections have Llama's shapes, as the paper (arXiv 2410.05258) asks.
- DIFF V2: 2H query heads over H key/value heads, as its authors ask.
- GDA 4:1: the proportions of the released Motif-2-12.7B (hidden size 4096, heads of 128): H signal
  heads, H/4 noise heads and H/2 key/value heads, so that twice the hidden size reaches the output
  projection. ``gda_heads`` sets another number.
- GDA 4:1, narrow: H/2 signal heads, H/8 noise heads and H/4 key/value heads. The signal heads are
  as many as DIFF V1's and the output projection has Llama's shape; only the noise heads are fewer.

Ours take "auto": on a GPU the kernels that its table names, else the fused ones; on a CPU torch's
attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import import_utils

from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM

TOLERANCE = 0.03
REFERENCE = "llama"  # the contender whose number of parameters the others are given


@dataclass(frozen=True)
class Sizes:
    """What all contenders share."""

    hidden_size: int = 512
    num_layers: int = 6
    head_dim: int = 64
    vocab_size: int = 4096
    intermediate_size: int = 1408
    """Llama's; 8/3 of the hidden size, rounded up. The others' follow from it."""
    intermediate_multiple: int = 64
    """Feed-forward widths are multiples of this, as fast matrix products want."""
    max_positions: int = 2048
    gda_heads: int | None = None
    """Query heads of the first GDA 4:1, signal and noise, a multiple of 5; None for Motif-2-12.7B's
    proportions.
    """
    tied: bool = False
    """Whether the output projection is the embedding."""

    @property
    def heads(self) -> int:
        """H, the query heads of softmax attention."""
        return self.hidden_size // self.head_dim

    def check(self) -> None:
        """Refuse sizes that some contender cannot have.

        Raises:
            UserError: with the sizes and the fix.
        """
        if self.hidden_size % self.head_dim or self.heads % 2:
            raise UserError(
                f"hidden_size={self.hidden_size} is not an even number of heads of head_dim={self.head_dim}, which "
                "differential attention pairs; choose another of the two"
            )

    def shrunk(self) -> Sizes:
        """The same proportions at heads of 16, and two layers: what smoke tests train."""
        by = max(1, self.head_dim // 16)
        return dataclasses.replace(
            self,
            hidden_size=self.hidden_size // by,
            num_layers=min(2, self.num_layers),
            head_dim=self.head_dim // by,
            vocab_size=self.vocab_size // by,
            intermediate_size=self.intermediate_size // by,
            intermediate_multiple=max(1, self.intermediate_multiple // by),
        )

    def gda(self, narrow: bool) -> int:
        """Query heads of a GDA 4:1, signal and noise together.

        Raises:
            UserError: they cannot be cut into groups of 5.
        """
        total = self.heads * 5 / 8 if narrow else self.heads * 5 / 4 if self.gda_heads is None else self.gda_heads
        if total < 5 or total % 5:
            fix = "leave it out of the models" if narrow else "give gda_heads"
            raise UserError(
                f"GDA 4:1{', narrow,' if narrow else ''} cannot have {total:g} query heads: they must be a multiple of "
                f"5 (4 signal heads to 1 noise head); {fix}, or a hidden_size of a multiple of 8 heads of "
                f"head_dim={self.head_dim}"
            )
        return int(total)


def _common(sizes: Sizes, intermediate_size: int) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.max_positions,
        "tie_word_embeddings": sizes.tied,
        "use_cache": False,  # a cache would only be copied into and thrown away
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _cudnn_attention(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """The attention of transformers through torch, by cuDNN's kernel alone."""
    # Inside what is compiled, for a kernel chosen around it would be no part of what the caches of
    # torch.compile know.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention_forward(*arguments, **options)


_CUDNN = "sdpa_cudnn"
AttentionInterface.register(_CUDNN, _cudnn_attention)
AttentionMaskInterface.register(_CUDNN, sdpa_mask)
_FLASH = "flash_attention_"

_Builder = Callable[[Sizes, int, str], PreTrainedModel]


def _motif(attention_type: str, hidden_act: str, narrow: bool = False) -> Callable[[Sizes, int, str], MotifForCausalLM]:
    def build(sizes: Sizes, intermediate_size: int, attention: str) -> MotifForCausalLM:
        heads, kv_heads, noise_heads = sizes.heads, sizes.heads, None
        if attention_type == "gda":
            heads = sizes.gda(narrow)
            noise_heads = heads // 5
            kv_heads = 2 * noise_heads
        elif attention_type == "diff_v2":
            heads = 2 * sizes.heads
        config = MotifConfig(
            **_common(sizes, intermediate_size),
            attention_type=attention_type,
            hidden_act=hidden_act,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_noise_heads=noise_heads,
        )
        config._attn_implementation = attention
        return MotifForCausalLM(config)

    return build


def _llama(sizes: Sizes, intermediate_size: int, attention: str) -> PreTrainedModel:
    config = LlamaConfig(
        **_common(sizes, intermediate_size), num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config)


def _diffllama(sizes: Sizes, intermediate_size: int, attention: str) -> PreTrainedModel:
    config = DiffLlamaConfig(
        **_common(sizes, intermediate_size), num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads
    )
    config._attn_implementation = attention
    return DiffLlamaForCausalLM(config)


@dataclass(frozen=True)
class Contender:
    """One model to compare."""

    name: str
    label: str
    """For people: in tables and pictures."""
    library: str
    attention: str
    """transformers' attn_implementation."""
    feed_forward: str
    builder: _Builder
    twin: Callable[[Sizes, int, str], MotifForCausalLM]
    """Builds our model with the same matrices and attention maps, which counts its own operations;
    ours are it.
    """

    def build(self, sizes: Sizes, intermediate_size: int) -> PreTrainedModel:
        """The model in float32 and training mode, on torch's default device, initialised from its
        global generator.
        """
        return self.builder(sizes, intermediate_size, self.attention).train()

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on "cpu" or "cuda" here; None if it can."""
        if self.attention == _CUDNN and device != "cuda":
            return "cuDNN's attention needs a GPU"
        if self.attention.startswith(_FLASH):
            generation = self.attention.removeprefix(_FLASH)
            if device != "cuda":
                return "flash-attn needs a GPU"
            if not getattr(import_utils, f"is_flash_attn_{generation}_available")():
                return f"flash-attn {generation} is not installed"
        return None


def _ours(name: str, label: str, feed_forward: str, twin: Callable[[Sizes, int, str], MotifForCausalLM]) -> Contender:
    return Contender(name, label, "motifarch", "auto", feed_forward, twin, twin)


def _theirs(name: str, label: str, attention: str) -> Contender:
    differential = name.startswith("diffllama")
    builder = _diffllama if differential else _llama
    twin = _motif("diff_v1" if differential else "softmax", "silu")
    return Contender(name, label, "transformers", attention, "SwiGLU", builder, twin)


CONTENDERS = {
    c.name: c
    for c in (
        _ours("gda", "GDA 4:1", "PolyNorm", _motif("gda", "poly_norm")),
        _ours("gda_narrow", "GDA 4:1 narrow", "PolyNorm", _motif("gda", "poly_norm", True)),
        _ours("diff_v1", "DIFF V1", "PolyNorm", _motif("diff_v1", "poly_norm")),
        _ours("diff_v2", "DIFF V2", "PolyNorm", _motif("diff_v2", "poly_norm")),
        _ours("softmax", "our softmax", "SwiGLU", _motif("softmax", "silu")),
        _theirs("diffllama_sdpa", "DiffLlama sdpa", "sdpa"),
        _theirs("diffllama_eager", "DiffLlama eager", "eager"),
        _theirs("llama", "Llama", "sdpa"),
        _theirs("llama_cudnn", "Llama cuDNN", _CUDNN),
        *(_theirs(f"llama_flash{n}", f"Llama flash-attn {n}", f"{_FLASH}{n}") for n in (2, 3, 4)),
    )
}
DIFFLLAMAS = tuple(name for name in CONTENDERS if name.startswith("diffllama"))
LLAMAS = tuple(name for name in CONTENDERS if name.startswith("llama"))


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters of a model."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Entry:
    """A contender with its feed-forward width; picklable."""

    name: str
    intermediate_size: int
    parameters: int
    relative_parameters: float
    """Parameters over the reference's."""

    @property
    def contender(self) -> Contender:
        """The model it is about."""
        return CONTENDERS[self.name]

    def build(self, sizes: Sizes) -> PreTrainedModel:
        """The model, with the number of parameters that was reckoned.

        Raises:
            AssertionError: it has another number.
        """
        model = self.contender.build(sizes, self.intermediate_size)
        if count_parameters(model) != self.parameters:
            raise AssertionError(f"{self.name} has {count_parameters(model):,} parameters, not {self.parameters:,}")
        return model

    def operations_per_token(self, sizes: Sizes, seq_len: int) -> float:
        """Operations of one token's forward and backward pass, by
        :meth:`MotifForCausalLM.flops_per_token`'s rule.

        Six for each weight of a linear layer, the output projection included, and causal attention
        at half of the full map, its backward pass twice its forward; what is computed again is not
        counted.
        """
        with torch.device("meta"):
            twin = self.contender.twin(sizes, self.intermediate_size, "auto")
        return twin.flops_per_token(seq_len)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        c = self.contender
        return {"name": c.name, "label": c.label, "library": c.library, "attention": c.attention} | {
            "feed_forward": c.feed_forward,
            "intermediate_size": self.intermediate_size,
            "parameters": self.parameters,
            "relative_parameters": self.relative_parameters,
        }


def _count(name: str, sizes: Sizes, intermediate_size: int) -> int:
    with torch.device("meta"):
        # By an attention that is everywhere: its parameters are the same, and flash-attn may not be
        # installed.
        return count_parameters(CONTENDERS[name].builder(sizes, intermediate_size, "eager"))


def match_parameters(names: Iterable[str], sizes: Sizes) -> dict[str, Entry]:
    """Give each contender the feed-forward width that makes its parameters most nearly the
    reference's.

    Raises:
        UserError: impossible sizes, or a contender that stays more than 3% away.
    """
    sizes.check()
    target = _count(REFERENCE, sizes, sizes.intermediate_size)
    unit = sizes.intermediate_multiple
    entries = {}
    for name in names:
        # Parameters grow by the same number with each unit of width.
        one, two = _count(name, sizes, unit), _count(name, sizes, 2 * unit)
        width = unit * max(1, 1 + round((target - one) / (two - one)))
        parameters = one + (width // unit - 1) * (two - one)
        if abs(parameters / target - 1) > TOLERANCE:
            raise UserError(
                f"{CONTENDERS[name].label} has {parameters:,} parameters at intermediate_size={width}, its nearest to "
                f"Llama's {target:,}: more than {TOLERANCE:.0%} away; widen the models or lower intermediate_multiple"
            )
        entries[name] = Entry(name, width, parameters, parameters / target)
    return entries
