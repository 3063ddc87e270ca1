"""The models that are compared: motifarch's and transformers', made equal where they can be.

All have one hidden size, number of layers, head_dim and vocabulary, embeddings tied in all or in
none, and no biases. The intermediate size makes the numbers of parameters equal. With
H = hidden_size / head_dim, the heads are those that a fair user would choose:

- Llama and our softmax: H query heads and as many key/value heads. Llama comes with each attention
  that transformers can give it: torch's own choice, cuDNN's through torch, each flash-attn.
- DiffLlama and DIFF V1: H query heads, H/2 pairs of signal and noise, over H key/value heads. The
  projections have Llama's shapes, as the paper (arXiv 2410.05258) asks.
- DIFF V2: 2H query heads over H key/value heads, as its authors ask.
- GDA 4:1: the proportions of Motif-2-12.7B: H signal heads, H/4 noise heads and H/2 key/value
  heads, so that twice the hidden size reaches the output projection.
- GDA 4:1 narrow: H/2 signal heads, H/8 noise heads and H/4 key/value heads. As many signal heads
  as DIFF V1, an output projection of Llama's shape, and fewer noise heads.

Ours take "auto": on a GPU the fastest kernels known there, on a CPU attention by blocked products
(torch's, where no heads share keys and sequences are long).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import import_utils

from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.study.intermediate_size import match_intermediate_size

TOLERANCE = 0.03
"""The largest difference from the reference's number of parameters."""
REFERENCE = "llama"


@dataclass(frozen=True)
class Sizes:
    """What all models share."""

    hidden_size: int = 512
    num_layers: int = 6
    head_dim: int = 64
    vocab_size: int = 4096
    intermediate_size: int = 1408
    """Llama's; the others' follow from it."""
    intermediate_multiple: int = 64
    max_positions: int = 2048
    gda_heads: int | None = None
    """Query heads of GDA 4:1, signal and noise; None for Motif-2-12.7B's proportions."""
    tied: bool = False
    """Whether the output projection is the embedding."""

    @property
    def heads(self) -> int:
        """Query heads of softmax attention."""
        return self.hidden_size // self.head_dim

    def shrunk(self) -> "Sizes":
        """The same proportions at heads of 16, and two layers: what smoke tests train."""
        by = max(1, self.head_dim // 16)
        names = ("hidden_size", "head_dim", "vocab_size", "intermediate_size", "intermediate_multiple")
        smaller = {name: max(1, getattr(self, name) // by) for name in names}
        return dataclasses.replace(self, **smaller, num_layers=min(2, self.num_layers))

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


def _cudnn_attention(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Transformers' attention through torch, by cuDNN's kernel alone."""
    # The choice is made inside the compiled region: around it, torch.compile's caches would not
    # know of it.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention_forward(*arguments, **options)


_CUDNN, _FLASH = "sdpa_cudnn", "flash_attention_"
AttentionInterface.register(_CUDNN, _cudnn_attention)
AttentionMaskInterface.register(_CUDNN, sdpa_mask)


@dataclass(frozen=True)
class Provider:
    """One model to compare."""

    name: str
    label: str
    """For tables and plots."""
    kind: str
    """"gda", "gda_narrow", "diff_v1", "diff_v2" or "softmax"."""
    feed_forward: str = "PolyNorm"
    library: str = "motifarch"
    attention: str = "auto"
    """transformers' attn_implementation."""

    def build(self, sizes: Sizes, intermediate_size: int) -> PreTrainedModel:
        """The model in float32 and training mode, with random weights."""
        if self.library == "motifarch":
            config: PreTrainedConfig = self.twin(sizes, intermediate_size)
        else:
            config = (LlamaConfig if self.kind == "softmax" else DiffLlamaConfig)(
                **_common(sizes, intermediate_size), num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads
            )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=self.attention)
        return model.train()

    def twin(self, sizes: Sizes, intermediate_size: int) -> MotifConfig:
        """Our model with the same matrices and attention maps; of ours, themselves."""
        heads, kv_heads, noise_heads = sizes.heads, sizes.heads, None
        if self.kind.startswith("gda"):
            heads = sizes.gda(narrow=self.kind == "gda_narrow")
            noise_heads, kv_heads = heads // 5, heads // 5 * 2
        elif self.kind == "diff_v2":
            heads = 2 * sizes.heads
        return MotifConfig(
            **_common(sizes, intermediate_size),
            attention_type=self.kind.removesuffix("_narrow"),
            hidden_act="silu" if self.feed_forward == "SwiGLU" else "poly_norm",
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_noise_heads=noise_heads,
        )

    def unsupported_reason(self, device: str) -> str | None:
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


def _common(sizes: Sizes, intermediate_size: int) -> dict[str, Any]:
    """Config fields that have the same names in all models."""
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.max_positions,
        "tie_word_embeddings": sizes.tied,
        "use_cache": False,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }


_LLAMA, _DIFFLLAMA = (("softmax", "SwiGLU", "transformers"), ("diff_v1", "SwiGLU", "transformers"))
PROVIDERS = {
    p.name: p
    for p in (
        Provider("gda", "GDA 4:1", "gda"),
        Provider("gda_narrow", "GDA 4:1 narrow", "gda_narrow"),
        Provider("diff_v1", "DIFF V1", "diff_v1"),
        Provider("diff_v2", "DIFF V2", "diff_v2"),
        Provider("softmax", "our softmax", "softmax", "SwiGLU"),
        Provider("diffllama_sdpa", "DiffLlama sdpa", *_DIFFLLAMA, "sdpa"),
        Provider("diffllama_eager", "DiffLlama eager", *_DIFFLLAMA, "eager"),
        Provider("llama", "Llama", *_LLAMA, "sdpa"),
        Provider("llama_cudnn", "Llama cuDNN", *_LLAMA, _CUDNN),
        *(Provider(f"llama_flash{n}", f"Llama flash-attn {n}", *_LLAMA, f"{_FLASH}{n}") for n in (2, 3, 4)),
    )
}
DIFFLLAMAS = tuple(name for name in PROVIDERS if name.startswith("diffllama"))
LLAMAS = tuple(name for name in PROVIDERS if name.startswith("llama"))


def choose(asked: Sequence[str] | None, default: Sequence[str], device: str) -> tuple[list[str], dict[str, str]]:
    """The models to measure on "cpu" or "cuda", and why others of the default cannot run there.

    Raises:
        UserError: one that was asked for cannot.
    """
    names = list(dict.fromkeys(asked or default))
    missing = {name: reason for name in names if (reason := PROVIDERS[name].unsupported_reason(device))}
    for name, reason in missing.items() if asked else ():
        raise UserError(f"{name} cannot be measured here: {reason}; leave it out of --models")
    return [name for name in names if name not in missing], missing


@dataclass(frozen=True)
class MatchedModel:
    """A provider with its intermediate size; picklable."""

    name: str
    intermediate_size: int
    parameters: int
    relative_parameters: float
    """Parameters over the reference's."""

    @property
    def provider(self) -> Provider:
        """Whose model it is."""
        return PROVIDERS[self.name]

    def build(self, sizes: Sizes) -> PreTrainedModel:
        """The model.

        Raises:
            AssertionError: it has another number of parameters than it was matched with.
        """
        model = self.provider.build(sizes, self.intermediate_size)
        if model.num_parameters() != self.parameters:
            raise AssertionError(f"{self.name} has {model.num_parameters():,} parameters, not {self.parameters:,}")
        return model

    def flops_per_token(self, sizes: Sizes, seq_len: int) -> float:
        """What :meth:`MotifForCausalLM.flops_per_token` counts of a model with these matrices."""
        with torch.device("meta"):
            return MotifForCausalLM(self.provider.twin(sizes, self.intermediate_size)).flops_per_token(seq_len)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        names = ("name", "label", "library", "attention", "feed_forward")
        return {name: getattr(self.provider, name) for name in names} | dataclasses.asdict(self)


def _count(name: str, sizes: Sizes, intermediate_size: int) -> int:
    # By an attention that is everywhere: parameters are the same, and flash-attn may be missing.
    with torch.device("meta"):
        return dataclasses.replace(PROVIDERS[name], attention="eager").build(sizes, intermediate_size).num_parameters()


def match_parameters(names: Iterable[str], sizes: Sizes) -> dict[str, MatchedModel]:
    """Give each model the intermediate size that makes its parameters most nearly the reference's.

    Raises:
        UserError: impossible sizes, or a model that stays more than 3% away.
    """
    if sizes.hidden_size % sizes.head_dim or sizes.heads % 2:
        raise UserError(
            f"hidden_size={sizes.hidden_size} is not an even number of heads of head_dim={sizes.head_dim}, which "
            "differential attention pairs; choose another of the two"
        )
    target = _count(REFERENCE, sizes, sizes.intermediate_size)
    matched = {}
    for name in names:
        count = partial(_count, name, sizes)
        width = match_intermediate_size(count, target, multiple=sizes.intermediate_multiple)
        parameters = count(width)
        if abs(parameters / target - 1) > TOLERANCE:
            raise UserError(
                f"{PROVIDERS[name].label} has {parameters:,} parameters at intermediate_size={width}, its nearest to "
                f"Llama's {target:,}: more than {TOLERANCE:.0%} away; widen the models or lower intermediate_multiple"
            )
        matched[name] = MatchedModel(name, width, parameters, parameters / target)
    return matched
