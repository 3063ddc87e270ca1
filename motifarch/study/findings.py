"""What a study's results say, before anyone draws or writes it: who ran, who differs, by how much, and how surely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from motifarch.study.statistics import Estimate, Noise, Paired, estimate, holm, paired, shared_noise, with_noise

ACTIVATIONS = {"poly_norm": "PolyNorm", "silu": "SwiGLU"}
_WORDS = {"gda": "GDA", "diff": "DIFF", "diff_v1": "DIFF V1", "diff_v2": "DIFF V2", "mha": "MHA", "gqa": "GQA"}
_WORDS |= {"v1": "V1", "v2": "V2"}

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One model of a study."""

    name: str
    size: str
    label: str
    """Its attention, for people: "GDA 4:1"."""
    activation: str
    """Its feed-forward, for people: "PolyNorm"."""
    row: Mapping[str, Any]
    """As results.json has it."""

    @property
    def title(self) -> str:
        """Attention and feed-forward."""
        return f"{self.label}, {self.activation}"


@dataclass(frozen=True)
class Comparison:
    """A variant against the one that it differs from in one thing."""

    variant: Variant
    reference: Variant
    paired: Paired | None
    """None where no seed finished for both."""
    p_holm: float | None
    """The paired test's p after Holm's correction over all comparisons of the study."""
    shared: tuple[Estimate, float] | None
    """The same difference with the noise of all variants of its size, and p; None where that is unknown."""
    shared_p_holm: float | None


class Study:
    """A study's results, asked by name."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        """Reads what ``results.json`` holds."""
        self.results = results
        self.variants = [_variant(row) for row in results["variants"]]
        self.runs: list[Run] = list(results["runs"])

    @cached_property
    def sizes(self) -> list[str]:
        """In the results' order."""
        return list(dict.fromkeys(v.size for v in self.variants))

    @cached_property
    def activations(self) -> list[str]:
        """Feed-forwards that occur."""
        return list(dict.fromkeys(v.activation for v in self.variants))

    @cached_property
    def seeds(self) -> list[int]:
        """Of all runs, those that failed too."""
        return sorted({run["seed"] for run in self.runs})

    @property
    def finished(self) -> list[Run]:
        """Runs that ended well."""
        return [run for run in self.runs if run["status"] == "finished"]

    def groups(self) -> Iterator[tuple[str, str, list[Variant]]]:
        """Variants that differ in nothing but their attention: (size, activation, variants)."""
        for size in self.sizes:
            for activation in self.activations:
                found = [v for v in self.variants if (v.size, v.activation) == (size, activation)]
                if found:
                    yield size, activation, found

    def group_title(self, size: str, activation: str) -> str:
        """A group in words, with no more of them than it takes to tell it from the others."""
        several = len(self.sizes) > 1
        return f"{size}, {activation}" if several else activation

    def title(self, variant: Variant) -> str:
        """A variant in words, likewise."""
        parts = [variant.label]
        if len(self.activations) > 1:
            parts.append(variant.activation)
        if len(self.sizes) > 1:
            parts.append(variant.size)
        return ", ".join(parts)

    def runs_of(self, variant: Variant) -> list[Run]:
        """A variant's finished runs."""
        return [run for run in self.finished if (run["variant"], run["size"]) == (variant.name, variant.size)]

    def values(self, variant: Variant, *path: str) -> dict[int, float]:
        """A measure of a variant's finished runs, by seed; runs that do not have it are left out.

        Args:
            variant: whose.
            path: where it stands in a run: ("validation_loss",) or ("speed", "train_tokens_per_s").
        """
        found = {}
        for run in self.runs_of(variant):
            value: Any = run
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, int | float) and math.isfinite(value):
                found[run["seed"]] = float(value)
        return found

    def loss(self, variant: Variant) -> Estimate | None:
        """Validation loss at the end, over seeds."""
        return estimate(list(self.values(variant, "validation_loss").values()))

    def reference(self, variants: Sequence[Variant]) -> Variant:
        """What the variants of a group are compared with: differential attention with one noise head a signal head.

        Without it softmax attention, and without that the first of them.
        """

        def rank(variant: Variant) -> int:
            attention, ratio = variant.row["attention"], variant.row.get("ratio")
            if attention == "diff_v1" or (attention == "gda" and ratio == 1):
                return 0
            return 1 if attention.startswith("softmax") else 2

        return min(variants, key=rank)

    def best(self, variants: Sequence[Variant]) -> Variant | None:
        """The lowest mean loss among those with the most finished seeds; None where nothing finished.

        A variant of which only a lucky seed is left would win otherwise: seeds differ by more than variants do.
        """
        losses = {v.name: e for v in variants if (e := self.loss(v)) is not None}
        most = max((e.n for e in losses.values()), default=0)
        means = {name: e.mean for name, e in losses.items() if e.n == most}
        return min((v for v in variants if v.name in means), key=lambda v: means[v.name], default=None)

    @cached_property
    def noise(self) -> dict[str, Noise | None]:
        """The noise of a run's loss, shared by all variants of a size."""
        return {
            size: shared_noise({v.name: self.values(v, "validation_loss") for v in self.variants if v.size == size})
            for size in self.sizes
        }

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every variant against its group's reference, and PolyNorm against SwiGLU under the same attention.

        Together they are the one family that p values are corrected for.
        """
        pairs = []
        for _, _, group in self.groups():
            reference = self.reference(group)
            pairs += [(v, reference) for v in group if v is not reference]
        plain = {(v.size, v.label): v for v in self.variants if v.activation == ACTIVATIONS["silu"]}
        others = [v for v in self.variants if v.activation != ACTIVATIONS["silu"]]
        pairs += [(v, plain[v.size, v.label]) for v in others if (v.size, v.label) in plain]
        tests = [paired(self.values(v, "validation_loss"), self.values(r, "validation_loss")) for v, r in pairs]
        shared = [
            with_noise(test.difference, noise) if test and (noise := self.noise[v.size]) else None
            for (v, _), test in zip(pairs, tests, strict=True)
        ]
        corrected = holm([test.p if test else None for test in tests])
        shared_corrected = holm([judged[1] if judged else None for judged in shared])
        return [
            Comparison(v, r, test, p, judged, shared_p)
            for (v, r), test, p, judged, shared_p in zip(pairs, tests, corrected, shared, shared_corrected, strict=True)
        ]


def _variant(row: Mapping[str, Any]) -> Variant:
    activation = ACTIVATIONS.get(row["activation"], row["activation"])
    drop = {row["activation"], row["size"], "swiglu"}
    words = [word for word in row["name"].replace("/", " ").split() if word.lower() not in drop]
    label = " ".join(_WORDS.get(word.lower(), word) for word in words) or row["name"]
    return Variant(row["name"], row["size"], label, activation, row)
