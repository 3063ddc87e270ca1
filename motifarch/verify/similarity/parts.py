"""A model's parts: each stack of layers with its residual width, such as a language model and the
vision encoder in front of it.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from motifarch.verify.similarity.tokens import Vocabulary
from motifarch.verify.similarity.weights import Weights, open_weights

ANCHORS = {
    "tokens": r"embed_tokens|\bwte\b|word_embeddings|tok_embeddings|token_embedding|\bshared\b",
    "output": r"lm_head|embed_out|^output\.",
    "patches": r"patch_embed|\bconv1\b|conv_proj",
    "positions": r"pos(ition)?_?(al_)?embed|\bwpe\b",
}
"""Tensors whose other axis nobody can permute freely: tokens, pixels, places."""
_WRITERS = r"o_proj|out_proj|c_proj|down_proj|fc2|\bw2\b|\bwo\b|attn\.proj|output\.dense|dense_4h_to_h"
_ATTENTION_NORM = r"input_layernorm|\bln_1\b|layer_norm1|norm1\b|attention_norm|layernorm_before"
_FEED_FORWARD_NORM = r"pre_feedforward_layernorm|\bln_2\b|layer_norm2|norm2\b|ffn_norm|layernorm_after"
_OR_ELSE = r"post_attention_layernorm"
"""In most models the feed-forward block's norm, in some (Gemma 2) the attention's output's."""


@dataclass
class Part:
    """A stack of layers.

    `layers` has the names of the tensors with a side on the residual channels: layer, then what
    the tensor is called in every layer, then the name itself, of each expert if there are several.
    """

    name: str
    width: int
    layers: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    vectors: dict[int, list[str]] = field(default_factory=dict)
    anchors: dict[str, str] = field(default_factory=dict)


class Model:
    """A model's weights in parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights: Weights = open_weights(folder)
        self.vocabulary = Vocabulary.read(folder)
        self.parts, self.left_out = _parts(self.weights)

    def sides(self, part: Part, layer: int, name: str) -> list[Tensor]:
        """A tensor as rows of residual channels (n, width), float32: one for each of its sides
        that has this width. What reads the channels is multiplied by the norm that goes before.
        """
        tensor = self.weights.read(name)
        if not tensor.is_floating_point():
            return []  # packed integers mean nothing without their scales
        tensor, sides = tensor.float(), []
        for axis in range(tensor.dim()):
            if tensor.shape[axis] == part.width:
                rows = tensor.movedim(axis, -1).flatten(0, -2)
                reads = axis == tensor.dim() - 1 or tensor.shape[-1] != part.width
                norm = self._norm(part, layer, name) if reads and not re.search(_WRITERS, name) else None
                sides.append(rows if norm is None else rows * norm)
        return sides

    def anchor(self, part: Part, kind: str) -> Tensor:
        """An anchor as rows of residual channels (n, width), in its own dtype."""
        tensor = self.weights.read(part.anchors[kind])
        axis = max(axis for axis in range(tensor.dim()) if tensor.shape[axis] == part.width)
        return tensor.movedim(axis, -1).flatten(0, -2)

    def _norm(self, part: Part, layer: int, name: str) -> Tensor | None:
        here, attends = part.vectors.get(layer, []), re.search("attn|attention", name)
        for wanted in (_ATTENTION_NORM,) if attends else (_FEED_FORWARD_NORM, _OR_ELSE):
            for vector in here:
                if vector.endswith("weight") and re.search(wanted, vector):
                    weight = self.weights.read(vector).float()
                    # Gemma stores what its norms add to one.
                    return weight if weight.mean() > 0.3 else 1 + weight
        return None


def _parts(weights: Weights) -> tuple[list[Part], list[str]]:
    """The parts, and the matrices that belong to none: no side of theirs has a part's width."""
    stacked: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    loose = []
    for name in weights.names:
        place = re.match(r"(?P<part>.*?)\.?(?<![^.])(?P<layer>\d+)\.(?P<rest>.+)", name)
        if place:
            same = re.sub(r"(?<![^.])\d+(?![^.])", "*", place["rest"])
            stacked[place["part"]].append((int(place["layer"]), same, name))
        else:
            loose.append(name)
    parts, left_out = [], []
    for prefix, tensors in stacked.items():
        matrices = [name for _, _, name in tensors if len(weights.shape(name)) > 1]
        sizes = Counter(size for name in matrices for size in set(weights.shape(name)))
        sizes.update(size for _, _, name in tensors if len(weights.shape(name)) == 1 for size in weights.shape(name))
        if not matrices:
            continue
        part = Part(prefix or "layers", sizes.most_common(1)[0][0])
        for layer, same, name in tensors:
            shape = weights.shape(name)
            if shape == (part.width,):
                part.vectors.setdefault(layer, []).append(name)
            elif len(shape) > 1 and part.width in shape:
                part.layers.setdefault(layer, {}).setdefault(same, []).append(name)
            elif len(shape) > 1:
                left_out.append(name)
        parts.append(part)
    for name in loose:
        shape = weights.shape(name)
        kind = next((kind for kind, pattern in ANCHORS.items() if re.search(pattern, name)), None)
        fitting = [part for part in parts if part.width in shape]
        if len(shape) < 2:
            continue
        if kind is None or not fitting:
            left_out.append(name)
            continue
        nearest = max(_shared(name, part.name) for part in fitting)
        for part in fitting:
            if _shared(name, part.name) == nearest:
                part.anchors.setdefault(kind, name)
    return parts, left_out


def _shared(name: str, part: str) -> int:
    """Components at the start of two names that are the same."""
    one, two = name.split("."), part.split(".")
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def drawn(size: int, most: int, seed: int = 0) -> Tensor:
    """At most so many of `size` places, the same each time, in order."""
    if size <= most:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:most].sort().values
