"""Whether two model folders compute the same; both run a layer at a time, to save memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motifarch.growth.folders import SourceFolder
from motifarch.growth.model_spec import ModelSpec
from motifarch.models.motif import MotifConfig
from motifarch.models.motif.decoder_layer import MotifDecoderLayer
from motifarch.models.motif.rotary import build_rotary

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


def difference(first: Weights, second: Weights, on_layer: Callable[[], None] = lambda: None) -> Difference:
    """Compares two Motif models of one vocabulary on random tokens, in float32 arithmetic."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(MotifConfig.from_dict(first.config).vocab_size, (1, _TOKENS), generator=generator)
    one, other = (logits(folder, ids, on_layer) for folder in (first, second))
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
    config = MotifConfig.from_dict(folder.config)
    hidden = folder.read("model.embed_tokens.weight")[ids].float()
    positions = build_rotary(config)(torch.arange(ids.shape[1])[None], torch.float32)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        with torch.device("meta"):
            layer = MotifDecoderLayer(config, i).eval()
        weights = {n.removeprefix(prefix): folder.read(n).float() for n in folder.names if n.startswith(prefix)}
        layer.load_state_dict(weights, assign=True)
        before_layer(layer)
        hidden = layer(hidden, positions)
        on_layer()
    norm = folder.read("model.norm.weight").float()
    hidden = F.rms_norm(hidden, norm.shape, norm, config.rms_norm_eps)
    head = folder.read("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    return torch.cat([hidden @ rows.float().T for rows in head.split(_VOCABULARY_ROWS)], dim=-1)
