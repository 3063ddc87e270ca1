"""What a study's results say, before anyone draws or writes it: who ran, who differs, by how much,
and how surely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from motifarch.study.statistics import (
    CONFIDENCE,
    Estimate,
    Noise,
    Paired,
    estimate,
    holm,
    paired,
    shared_noise,
    with_noise,
)

ALPHA = 1 - CONFIDENCE
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

    @property
    def ratio(self) -> int | None:
        """Signal heads for each noise head of DIFF V1 (1) and GDA; None for layers of another
        kind.
        """
        return (self.row.get("ratio") or 1) if self.row["attention"] in ("diff_v1", "gda") else None

    @property
    def signal_heads(self) -> int | None:
        """Query heads that are no noise heads; None where the results do not say."""
        model = self.row.get("model", {})
        heads: int | None = model.get("num_attention_heads")
        return None if heads is None else heads - (model.get("num_noise_heads") or 0)


@dataclass(frozen=True)
class Comparison:
    """A variant against another that it differs from in one thing."""

    variant: Variant
    reference: Variant
    paired: Paired | None
    """None where no seed finished for both."""
    p_holm: float | None
    """The paired test's p after Holm's correction over all comparisons of the study."""
    shared: tuple[Estimate, float] | None
    """The same difference with the noise of all variants of its size, and p; None where that is
    unknown.
    """
    shared_p_holm: float | None

    @property
    def mean(self) -> float:
        """Variant minus reference; 0 where no pair finished."""
        return self.paired.difference.mean if self.paired else 0.0

    @property
    def significant(self) -> bool:
        """Whether it is beyond what the pair's own seeds explain, after correction."""
        return self.p_holm is not None and self.p_holm <= ALPHA

    @property
    def significant_if_equally_noisy(self) -> bool:
        """Whether it is beyond the noise of all variants together, after correction."""
        return self.shared_p_holm is not None and self.shared_p_holm <= ALPHA

    def reversed(self) -> Comparison:
        """The same with the roles exchanged."""
        return replace(
            self,
            variant=self.reference,
            reference=self.variant,
            paired=self.paired and replace(self.paired, difference=-self.paired.difference),
            shared=self.shared and (-self.shared[0], self.shared[1]),
        )


class Study:
    """A study's results, asked by name."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        """Reads what ``results.json`` holds."""
        self.results = results
        found = [_variant(row) for row in results["variants"]]
        self.sizes = list(dict.fromkeys(v.size for v in found))
        self.activations = list(dict.fromkeys(v.activation for v in found))
        """Feed-forwards that occur."""
        # Softmax attention, rising head ratios, the rest: whatever the order in which a grid names
        # them.
        self.variants = sorted(
            found, key=lambda v: (self.sizes.index(v.size), self.activations.index(v.activation), *_order(v))
        )
        self.runs: list[Run] = list(results["runs"])

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

    @cached_property
    def main_group(self) -> list[Variant]:
        """The one to speak of first: of the largest models, that with most head ratios and
        variants.
        """
        groups = [group for _, _, group in self.groups()]
        most = max(max(v.row["parameters"] for v in group) for group in groups)
        sizes = {v.size for v in self.variants if v.row["parameters"] == most}
        return max((g for g in groups if g[0].size in sizes), key=lambda g: (len(self.ratios(g)), len(g)))

    def panels(self) -> list[tuple[str, list[Variant]]]:
        """What is drawn together, with a title: groups; one that is a single variant joins its
        size's largest.
        """
        groups = list(self.groups())
        found = []
        for size in self.sizes:
            own = [(activation, group) for s, activation, group in groups if s == size]
            largest = max(own, key=lambda named: len(named[1]))
            alone = [v for named in own if named is not largest and len(named[1]) == 1 for v in named[1]]
            for activation, group in own:
                if (activation, group) == largest:
                    found.append((self.group_title(size, activation), [*group, *alone]))
                elif len(group) > 1:
                    found.append((self.group_title(size, activation), group))
        return found

    def label_in(self, panel: Sequence[Variant], variant: Variant) -> str:
        """A variant's attention, and its feed-forward where that is not its panel's."""
        alike = variant.activation == panel[0].activation
        return variant.label if alike else f"{variant.label} {variant.activation}"

    def group_title(self, size: str, activation: str) -> str:
        """A group in words, with no more of them than it takes to tell it from the others."""
        several = len(self.sizes) > 1
        return f"{size}, {activation}" if several else activation

    def title(self, variant: Variant) -> str:
        """A variant in words, likewise."""
        parts = [variant.label]
        compared = {activation for _, activation, group in self.groups() if len(group) > 1}
        if len(compared) > 1 or variant.activation != self.main_group[0].activation:
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

    def by_layer(self, variant: Variant, name: str) -> list[tuple[int, float]]:
        """An attention statistic, mean over seeds: (layer, value), layers counted from 0."""
        runs = [(run.get("attention") or {}).get("layers") or [] for run in self.runs_of(variant)]
        found = []
        for i in range(max(map(len, runs), default=0)):
            values = [v for layers in runs if i < len(layers) and (v := layers[i].get(name)) is not None]
            if values:
                found.append((i, math.fsum(values) / len(values)))
        return found

    def loss(self, variant: Variant) -> Estimate | None:
        """Validation loss at the end, over seeds."""
        return estimate(list(self.values(variant, "validation_loss").values()))

    def reference(self, variants: Sequence[Variant]) -> Variant:
        """What the variants of a group are compared with: differential attention with one noise
        head a signal head.

        Without it softmax attention, and without that the first of them.
        """

        def rank(variant: Variant) -> int:
            if variant.ratio == 1:
                return 0
            return 1 if variant.row["attention"].startswith("softmax") else 2

        return min(variants, key=rank)

    def ratios(self, variants: Sequence[Variant]) -> list[Variant]:
        """Those with a head ratio, rising."""
        return sorted((v for v in variants if v.ratio is not None), key=lambda v: v.ratio or 0)

    def eligible(self, variants: Sequence[Variant]) -> list[Variant]:
        """Those that can be the best: with finished runs, and no more failed ones than others.

        Of a variant that diverges, only lucky seeds are left.
        """
        finished = [v for v in variants if self.values(v, "validation_loss")]
        size = {v.size for v in variants}
        failed = [r["variant"] for r in self.runs if r["status"] == "failed" and r["size"] in size]
        fewest = min((failed.count(v.name) for v in finished), default=0)
        return [v for v in finished if failed.count(v.name) == fewest]

    def best(self, variants: Sequence[Variant]) -> Variant | None:
        """The lowest mean loss of the eligible, on the seeds that all of them finished; None where
        nothing finished.
        """
        chosen = self.eligible(variants)
        losses = {v.name: self.values(v, "validation_loss") for v in chosen}
        shared = set.intersection(*(set(losses[v.name]) for v in chosen)) if chosen else set()

        def mean(variant: Variant) -> float:
            own = losses[variant.name]
            seeds = shared or own.keys()
            return math.fsum(own[seed] for seed in seeds) / len(seeds)

        return min(chosen, key=mean, default=None)

    @cached_property
    def noise(self) -> dict[str, Noise | None]:
        """The noise of a run's loss, shared by all variants of a size."""
        return {
            size: shared_noise({v.name: self.values(v, "validation_loss") for v in self.variants if v.size == size})
            for size in self.sizes
        }

    def paired(self, variant: Variant, reference: Variant) -> Paired | None:
        """Their losses seed by seed; None where no seed finished for both."""
        return paired(self.values(variant, "validation_loss"), self.values(reference, "validation_loss"))

    def compared(self, variant: Variant, reference: Variant) -> Comparison | None:
        """The comparison of two variants; None where it is none of :attr:`comparisons`."""
        for found in self.comparisons:
            if (found.variant, found.reference) == (variant, reference):
                return found
            if (found.variant, found.reference) == (reference, variant):
                return found.reversed()
        return None

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every variant against its group's reference, head ratios with each other, and PolyNorm
        against SwiGLU.

        Together they are the one family that p values are corrected for. All pairs of ratios are in
        it, so that the best one may be compared with the rest although it was found by looking.
        """
        pairs = []
        for _, _, group in self.groups():
            reference = self.reference(group)
            pairs += [(v, reference) for v in group if v is not reference]
            others = [v for v in self.ratios(group) if v is not reference]
            pairs += [(higher, lower) for lower, higher in combinations(others, 2)]
        plain = {(v.size, v.label): v for v in self.variants if v.activation == ACTIVATIONS["silu"]}
        others = [v for v in self.variants if v.activation != ACTIVATIONS["silu"]]
        pairs += [(v, plain[v.size, v.label]) for v in others if (v.size, v.label) in plain]
        tests = [self.paired(v, r) for v, r in pairs]
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


def _order(variant: Variant) -> tuple[int, int]:
    if variant.ratio is not None:
        return 1, variant.ratio
    return (0 if variant.row["attention"].startswith("softmax") else 2), 0


def _variant(row: Mapping[str, Any]) -> Variant:
    activation = ACTIVATIONS.get(row["activation"], row["activation"])
    drop = {row["activation"], row["size"], "swiglu"}
    words = [word for word in row["name"].replace("/", " ").split() if word.lower() not in drop]
    label = " ".join(_WORDS.get(word.lower(), word) for word in words) or row["name"]
    return Variant(row["name"], row["size"], label, activation, row)
