"""Whether two models compute the same; both run a layer at a time, to save memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from motifarch.growth.folders import SourceFolder
from motifarch.growth.model_spec import ModelSpec
from motifarch.layers import expand_streams, merge_streams
from motifarch.models.motif import MotifConfig
from motifarch.models.motif.decoder_layer import MotifDecoderLayer
from motifarch.models.motif.rotary import build_rotaries

_TOKENS = 32
_VOCABULARY_ROWS = 2**14
"""Rows of the output projection that are held in float32 at a time."""


class Described:
    """The model that a spec makes of the source folder that it reads, without writing it."""

    def __init__(self, spec: ModelSpec, source: SourceFolder) -> None:
        self.config, self.names = spec.config, list(spec.tensors)
        self._tensors, self._source = spec.tensors, source

    def read(self, name: str) -> Tensor:
        """A tensor, made of those of the source."""
        lazy = self._tensors[name]
        return lazy.make(*map(self._source.read, lazy.sources))


Weights = SourceFolder | Described


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart."""

    largest: float
    """The largest absolute difference."""
    spread: float
    """The standard deviation of the first model's logits, to compare it with."""
    tokens: int
    """Random tokens that both read."""


def config_of(folder: Weights) -> PreTrainedConfig:
    """The config of a Motif model, or of transformers' model of another kind."""
    kind = str(folder.config.get("model_type"))
    config: PreTrainedConfig = (MotifConfig if kind.lower() == "motif" else CONFIG_MAPPING[kind]).from_dict(
        folder.config
    )
    return config


def difference(
    first: Weights, second: Weights, on_layer: Callable[[], None] = lambda: None, *, same_ids: int | None = None
) -> Difference:
    """Compares two models on random tokens, in float32 arithmetic.

    ``same_ids`` is how many token ids mean the same to both, and have their logits compared; None
    for the whole vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    known = config_of(first).vocab_size if same_ids is None else same_ids
    ids = torch.randint(known, (1, _TOKENS), generator=generator)
    one, other = (logits(folder, ids, on_layer)[..., :known] for folder in (first, second))
    return Difference(float((one - other).abs().max()), float(one.std()), ids.numel())


@torch.no_grad()
def logits(
    folder: Weights,
    ids: Tensor,
    on_layer: Callable[[], None] = lambda: None,
    *,
    before_layer: Callable[[nn.Module], None] = lambda layer: None,
) -> Tensor:
    """A model's float32 logits (B, S, vocabulary) of ids (B, S), with one layer in memory at a
    time.
    """
    config = config_of(folder)
    hidden = folder.read("model.embed_tokens.weight")[ids].float()
    if isinstance(config, MotifConfig):
        hidden = _through_motif(hidden, folder, config, on_layer, before_layer)
    else:
        hidden = _through_transformers(hidden, folder, config, on_layer)
    norm = folder.read("model.norm.weight").float()
    hidden = F.rms_norm(hidden, norm.shape, norm, config.rms_norm_eps)
    head = folder.read("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    return torch.cat([hidden @ rows.float().T for rows in head.split(_VOCABULARY_ROWS)], dim=-1)


def _through_motif(
    hidden: Tensor,
    folder: Weights,
    config: MotifConfig,
    on_layer: Callable[[], None],
    before_layer: Callable[[nn.Module], None],
) -> Tensor:
    places = torch.arange(hidden.shape[1])[None]
    positions = {kind: rotary(places, torch.float32) for kind, rotary in build_rotaries(config).items()}
    if config.mhc_enabled:
        hidden = expand_streams(hidden, config.mhc_expansion_rate)
    for i in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = MotifDecoderLayer(config, i).eval()
        _load(layer, folder, i)
        before_layer(layer)
        hidden = layer(hidden, positions[layer.layer_type])
        on_layer()
    if config.mhc_enabled:
        hidden = merge_streams(hidden)
    return hidden


def _through_transformers(
    hidden: Tensor, folder: Weights, config: PreTrainedConfig, on_layer: Callable[[], None]
) -> Tensor:
    """By the layers of transformers' own model, whose attention is causal without a mask."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
        ).eval()
    places = torch.arange(hidden.shape[1])[None]
    positions = type(model.model.rotary_emb)(config)(hidden, places)
    for i, layer in enumerate(model.model.layers):
        _load(layer, folder, i)
        hidden = layer(hidden, position_ids=places, position_embeddings=positions)
        layer.to_empty(device="meta")
        on_layer()
    return hidden


def _load(layer: nn.Module, folder: Weights, index: int) -> None:
    prefix = f"model.layers.{index}."
    weights = {n.removeprefix(prefix): folder.read(n).float() for n in folder.names if n.startswith(prefix)}
    layer.load_state_dict(weights, assign=True)
