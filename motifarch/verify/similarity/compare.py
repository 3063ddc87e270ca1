"""Compares the parts of two models, layer by layer, under every alignment of their channels."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from motifarch.progress import progress
from motifarch.verify.similarity.alignment import MOST_CHANNELS, MOST_ROTATED, Alignment, How, Key, alignments
from motifarch.verify.similarity.fingerprint import fingerprint, levelled_gram, standardised
from motifarch.verify.similarity.graph_matching import match_graphs
from motifarch.verify.similarity.limits import LIMITS
from motifarch.verify.similarity.parts import ANCHORS, Model, Part, drawn
from motifarch.verify.similarity.tokens import Overlap, overlap, same_tokens
from motifarch.weight_files import listed

_MOST_ROWS = 16_384
"""Rows of an anchor that are compared, drawn once."""
_SAMPLE = 4_096
"""Numbers of a tensor of which the plain cosine is taken."""
_LEAST_ROWS = 32
_MAY_BE_FIXED = ("positions",)
"""Anchors that may be the same sinusoids in models that have nothing to do with each other."""
_LEAST_GRAPHS, _MOST_GRAPHS = 2, 6
"""Matrices that graphs are matched with: as many again at least are left to show something."""

_Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerMatch:
    """A layer of the model beside the one of the other that is most like it."""

    layer: int
    other: int
    score: float
    """Mean over the layer's matrices of the correlation of fingerprints; 1 is the same."""
    matrices: dict[str, float]
    cosine: float | None
    """Mean plain cosine of tensors of equal name, layer and shape."""


@dataclass(frozen=True)
class PartMatch:
    """A part of the model beside one of another, under the alignment that shows most."""

    part: str
    other: str
    how: How
    anchor: float | None
    """Correlation of the channels of embeddings on rows that the alignment was not found with."""
    cka: float | None
    """Linear CKA of the same rows (Kornblith et al. 2019)."""
    layers: list[LayerMatch]
    ways: dict[How, tuple[float, float | None]]
    """Of every alignment that was tried: the score of the most alike layer, the anchor's."""
    excess: float
    """The likeness as a part of what is an alarm."""
    reason: str

    @property
    def alarm(self) -> bool:
        """Whether it is more alike than independent models are."""
        return self.excess > 1

    @property
    def score(self) -> float:
        """That of the most alike layer."""
        return max((layer.score for layer in self.layers), default=0.0)


@dataclass
class Comparison:
    """A model beside one other."""

    folder: Path
    """The other's."""
    parts: list[PartMatch] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What could not be compared, and why."""
    tokenizer: Overlap | None = None

    @property
    def alarms(self) -> list[PartMatch]:
        """Parts of the model that seem to come from the other."""
        return [part for part in self.parts if part.alarm]

    @property
    def nearest(self) -> list[PartMatch]:
        """For each part of the model the most alike one of the other."""
        best: dict[str, PartMatch] = {}
        for part in sorted(self.parts, key=lambda part: (round(part.excess, 2), part.score)):
            best[part.part] = part
        return [best[name] for name in dict.fromkeys(part.part for part in self.parts)]


@dataclass(frozen=True)
class _Survey:
    """What is kept of a part's matrices when they have been read."""

    prints: list[dict[Key, Tensor]]
    """Fingerprints, for each way to take the channels."""
    profile: dict[Key, Tensor]
    samples: dict[tuple[int, str], tuple[tuple[int, ...], Tensor]]


class Comparer:
    """Compares one model with others; what is known of it is kept.

    Args:
        model: the one that is looked at.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._own: dict[str, _Survey] = {}

    def compare(self, other: Model) -> Comparison:
        """Every part of the model beside every part of another where widths or anchors allow."""
        model, result = self._model, Comparison(other.folder)
        for part in model.parts:
            for theirs in other.parts:
                where = f"{part.name} (width {part.width}) beside {theirs.name} (width {theirs.width})"
                if part.width != theirs.width and not part.anchors.keys() & theirs.anchors.keys():
                    result.left_out.append(f"{where}: widths differ, and no embeddings to match channels by")
                    continue
                # Channels of the narrower one are looked for among those of the wider one.
                if part.width <= theirs.width:
                    found = self._match(part, other, theirs)
                else:
                    found = _inverted(Comparer(other)._match(theirs, model, part))
                if found:
                    result.parts.append(found)
                else:
                    result.left_out.append(f"{where}: too few rows or channels")
        for whose in (model, other):
            if not whose.parts:
                result.left_out.append(f"{whose.folder.name}: it has no stack of layers")
            elif whose.left_out:
                result.left_out.append(
                    f"{listed(whose.left_out)} of {whose.folder.name}: no side is as wide as a part's layers"
                )
        if model.vocabulary and other.vocabulary:
            result.tokenizer = overlap(model.vocabulary, other.vocabulary)
        return result

    def _match(self, part: Part, other: Model, other_part: Part) -> PartMatch | None:
        model, widths = self._model, (part.width, other_part.width)
        channels = drawn(part.width, MOST_CHANNELS)
        if part.name not in self._own:
            self._own[part.name] = _survey(model, part, [lambda rows: rows[:, channels]])
        own = self._own[part.name]
        kind, anchors = _anchors(model, part, other, other_part)
        ways = alignments(channels, widths, anchors)
        theirs = _survey(other, other_part, [way.take for way in ways])
        found = [(way, _layers(own, theirs, prints, way)) for way, prints in zip(ways, theirs.prints, strict=True)]
        cka = None if anchors is None else _cka(*anchors)
        judged = partial(_judged, part, other_part, cka=cka, counts=kind not in _MAY_BE_FIXED)
        if found and judged(found).alarm:
            return judged(found)
        # Embeddings may have been replaced. Graphs take longer to match.
        way = self._by_graphs(part, other, other_part, channels, theirs.profile)
        if way is not None:
            (prints,) = _survey(other, other_part, [way.take]).prints
            found.append((way, _layers(own, theirs, prints, way)))
        return judged(found) if any(layers for _, layers in found) else None

    def _by_graphs(
        self, part: Part, other: Model, other_part: Part, channels: Tensor, profile: Mapping[Key, Tensor]
    ) -> Alignment | None:
        """The way that graphs of some matrices show, if both parts have as many again."""
        own = self._own[part.name].profile
        both = [key for key in own if key in profile]
        # Of a square matrix nobody knows which side is on the residual channels; experts would take
        # long, each by itself.
        plain = [
            key
            for key in both
            if {(*key[:2], 0), (*key[:2], 1)} & own.keys() == {key}
            and len(part.layers[key[0]][key[1]]) == len(other_part.layers[key[0]][key[1]]) == 1
        ]
        some = drawn(len(plain[::2]), _MOST_GRAPHS).tolist()
        if max(part.width, other_part.width) > MOST_ROTATED or len(some) < _LEAST_GRAPHS:
            return None
        keys = [plain[::2][i] for i in some]
        one, two = _grams(self._model, part, keys), _grams(other, other_part, keys)
        if one is None or two is None:
            return None
        norms = [torch.stack([of[key] for key in both]) for of in (own, profile)]
        index, sign = match_graphs(one, two, (norms[0], norms[1]), channels)
        return Alignment("by graph matching", lambda rows: rows[:, index] * sign, found_with=frozenset(keys))


def _grams(model: Model, part: Part, keys: Sequence[Key]) -> Tensor | None:
    """Levelled Gram matrices of all channels (matrices, width, width); None where one has none."""
    found = []
    with progress(f"matching {part.name} of {model.folder.name}", len(keys), of="matrices") as advance:
        for layer, same, side in keys:
            (name,) = part.layers[layer][same]
            gram = levelled_gram(model.sides(part, layer, name)[side])
            if gram is None:
                return None
            found.append(gram)
            advance()
    return torch.stack(found)


def _judged(
    part: Part, other: Part, found: Sequence[tuple[Alignment, list[LayerMatch]]], *, cka: float | None, counts: bool
) -> PartMatch:
    """The alignment that shows most; `counts` says whether a likeness of anchors is an alarm."""
    limit = LIMITS.of_layers(min(part.width, other.width, MOST_CHANNELS))
    scores = {way.how: (max((layer.score for layer in layers), default=0.0), way.anchor) for way, layers in found}

    def excess(way: Alignment) -> tuple[float, float]:
        layers, anchor = scores[way.how]
        return layers / limit, (anchor or 0.0) * counts / LIMITS.anchor

    # Of ways that show the same the first, which is the plainest.
    best, layers = max(found, key=lambda one: round(max(excess(one[0])), 2))
    by_layers, by_anchor = excess(best)
    reason = " and ".join(["its layers"] * (by_layers > 1) + ["its embeddings"] * (by_anchor > 1))
    most = max(by_layers, by_anchor)
    return PartMatch(part.name, other.name, best.how, best.anchor, cka, layers, scores, most, reason)


def _inverted(found: PartMatch | None) -> PartMatch | None:
    """The same from the other's side."""
    if found is None:
        return None
    layers = [replace(match, layer=match.other, other=match.layer) for match in found.layers]
    layers.sort(key=lambda match: match.layer)
    return replace(found, part=found.other, other=found.part, layers=layers)


def _layers(own: _Survey, theirs: _Survey, prints: dict[Key, Tensor], way: Alignment) -> list[LayerMatch]:
    """The other's most alike layer for each one; without matrices that the way was found with."""
    keys, others = ([key for key in found if key not in way.found_with] for found in (own.prints[0], prints))
    if not keys or not others:
        return []
    one, two = torch.stack([own.prints[0][key] for key in keys]), torch.stack([prints[key] for key in others])
    correlation = one @ two.T
    by_layer: dict[int, list[int]] = defaultdict(list)
    for i, (layer, _, _) in enumerate(others):
        by_layer[layer].append(i)
    # A matrix is beside the most alike one of a layer: names differ among architectures.
    best = torch.stack([correlation[:, places].max(dim=1).values for places in by_layer.values()], dim=1)
    matches = []
    for layer in sorted({key[0] for key in keys}):
        names: dict[str, list[int]] = defaultdict(list)
        for i, (of, name, _) in enumerate(keys):
            if of == layer:
                names[name].append(i)
        # A square matrix has two sides, one of which is on the residual channels.
        values = torch.stack([best[places].max(dim=0).values for places in names.values()])
        score, at = values.mean(dim=0).max(dim=0)
        matrices = {name: float(value) for name, value in zip(names, values[:, at], strict=True)}
        matches.append(LayerMatch(layer, list(by_layer)[int(at)], float(score), matrices, _cosine(own, theirs, layer)))
    return matches


def _cosine(own: _Survey, theirs: _Survey, layer: int) -> float | None:
    cosines = [
        float(torch.cosine_similarity(sample, theirs.samples[key][1], dim=0))
        for key, (shape, sample) in own.samples.items()
        if key[0] == layer and key in theirs.samples and theirs.samples[key][0] == shape
    ]
    return sum(cosines) / len(cosines) if cosines else None


def _survey(model: Model, part: Part, takes: Sequence[_Take]) -> _Survey:
    """Reads a part once."""
    survey = _Survey([{} for _ in takes], {}, {})
    total = sum(len(names) for tensors in part.layers.values() for names in tensors.values())
    with progress(f"reading {part.name} of {model.folder.name}", total, of="tensors") as advance:
        for layer, tensors in part.layers.items():
            for same, names in tensors.items():
                sums: dict[tuple[int, int], Tensor] = {}
                for name in names:  # a layer's experts together, for their order means nothing
                    for side, rows in enumerate(model.sides(part, layer, name)):
                        if rows.shape[0] and name == names[0] and side == 0:
                            survey.samples[layer, same] = (tuple(rows.shape), _sample(rows))
                        # Of rows of equal norm: heads and neurons may have been scaled.
                        squares = torch.nn.functional.normalize(rows, dim=1).square().sum(dim=0)
                        key = (layer, same, side)
                        survey.profile[key] = survey.profile.get(key, 0) + squares
                        for i, take in enumerate(takes):
                            found = fingerprint(take(rows))
                            if found is not None:
                                sums[i, side] = sums.get((i, side), 0) + found
                    advance()
                for (i, side), vector in sums.items():
                    whole = standardised(vector)
                    if whole is not None:
                        survey.prints[i][layer, same, side] = whole
    for key, squares in survey.profile.items():
        survey.profile[key] = squares.clamp_min(1e-12).log()
    return survey


def _sample(rows: Tensor) -> Tensor:
    places = torch.randint(rows.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(rows.numel()))
    return rows.flatten()[places]


def _anchors(
    model: Model, part: Part, other: Model, other_part: Part
) -> tuple[str, tuple[Tensor, Tensor]] | tuple[None, None]:
    """The first anchor that both models have, and its rows that stand for the same tokens or
    pixels.
    """
    for kind in sorted(part.anchors.keys() & other_part.anchors.keys(), key=list(ANCHORS).index):
        one, two = model.anchor(part, kind), other.anchor(other_part, kind)
        if kind in ("tokens", "output"):
            ids = same_tokens(model.vocabulary, other.vocabulary, (len(one), len(two)))
        elif len(one) == len(two):
            ids = (torch.arange(len(one)),) * 2
        else:
            continue
        some = drawn(len(ids[0]), _MOST_ROWS)
        if len(some) >= _LEAST_ROWS:
            return kind, (one[ids[0][some]].float(), two[ids[1][some]].float())
    return None, None


def _cka(one: Tensor, two: Tensor) -> float:
    one, two = one - one.mean(dim=0), two - two.mean(dim=0)
    return float((one.T @ two).norm() ** 2 / ((one.T @ one).norm() * (two.T @ two).norm()).clamp_min(1e-12))
