"""What a study's results say: losses with intervals, paired differences, significance and power.

Seeds are drawn at random and their losses taken as normal, so intervals are Student's t. Variants
are compared on the seeds that both finished: such runs share data order and initial scale, so what
a seed does to both cancels in the difference. Three seeds say little about one pair's noise; where
all variants may be taken to be equally noisy, `shared_noise` estimates it from all of them, as the
residual of a randomised block design (Fisher, "The Design of Experiments", 1935).

The tests are scipy's and statsmodels'; what is ours is which of them are asked together.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from motifarch.errors import UserError
from motifarch.field_types import is_import_path

KIND, FORMAT = "head_ratio_study", 1
ALPHA = 0.05
"""Of tests, and 1 less the confidence of intervals."""
POWER = 0.8
ACTIVATIONS = {"poly_norm": "PolyNorm", "silu": "SwiGLU"}
_WORDS = {"gda": "GDA", "diff_v1": "DIFF V1", "diff_v2": "DIFF V2", "mha": "MHA", "gqa": "GQA"}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and what is known of its error."""

    mean: float
    n: int
    sd: float | None = None
    """Standard deviation between seeds; None for a single one, as `half` and `p` are."""
    half: float | None = None
    """Half the width of the interval, which is symmetric."""
    p: float | None = None
    """Two-sided p value of the t test that the true mean is 0."""


@dataclass(frozen=True)
class Noise:
    """What is left of the losses once variants and seeds have taken their part."""

    sd: float
    """Standard deviation of a single run."""
    freedom: int
    """Degrees of freedom that it was estimated with."""


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean with Student's interval and t test; values that are not finite are left out.

    Returns:
        None where there are no values. A single value has no interval and no test.
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return Estimate(finite[0], 1) if finite else None
    mean, sd = float(np.mean(finite)), float(np.std(finite, ddof=1))
    return _judged(mean, len(finite), sd, sd / math.sqrt(len(finite)), len(finite) - 1)


def _judged(mean: float, n: int, sd: float, error: float, freedom: float) -> Estimate:
    """A mean with the interval and p value of its standard error."""
    if error == 0:  # the test's limit
        return Estimate(mean, n, sd, 0.0, float(mean == 0))
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    return Estimate(mean, n, sd, half, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def paired(variant: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Variant minus reference over the seeds (keys) that both have: the paired t test."""
    return estimate([variant[seed] - reference[seed] for seed in sorted(variant) if seed in reference])


def welch(old: Sequence[float], new: Sequence[float]) -> Estimate | None:
    """The mean of new values less that of unrelated old ones, by Welch's t test.

    Returns:
        None where either has fewer than two values.
    """
    if len(old) < 2 or len(new) < 2:
        return None
    mean = float(np.mean(new) - np.mean(old))
    if np.std(old) == np.std(new) == 0:
        return Estimate(mean, len(new), None, 0.0, float(mean == 0))
    test = stats.ttest_ind(new, old, equal_var=False)
    interval = test.confidence_interval(1 - ALPHA)
    return Estimate(mean, len(new), None, float(interval.high - interval.low) / 2, float(test.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusts p values for being several, after Holm; None (not tested) does not count."""
    tested = [p for p in p_values if p is not None]
    adjusted = iter(multipletests(tested, method="holm")[1].tolist() if tested else [])
    return [None if p is None else next(adjusted) for p in p_values]


def shared_noise(losses: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """The noise of one run from all variants together: loss = variant + seed + noise.

    It holds as far as all variants are equally noisy and a seed moves all of them alike.

    Args:
        losses: variant -> seed -> loss of the finished runs; None where they leave nothing over.
    """
    cells = [(v, seed, loss) for v, runs in losses.items() for seed, loss in runs.items()]
    if not cells:
        return None
    names, seeds = (np.array([cell[i] for cell in cells]) for i in (0, 1))
    blocks = np.hstack([names[:, None] == np.unique(names), seeds[:, None] == np.unique(seeds)[1:]])
    fit = OLS([loss for *_, loss in cells], blocks.astype(float)).fit()
    return Noise(math.sqrt(fit.mse_resid), round(fit.df_resid)) if fit.df_resid >= 1 else None


def with_noise(difference: Estimate, noise: Noise) -> Estimate:
    """A paired difference judged by the noise of all variants instead of its own."""
    sd = noise.sd * math.sqrt(2)
    return _judged(difference.mean, difference.n, sd, sd / math.sqrt(difference.n), noise.freedom)


def detectable_difference(sd: float, n: int, alpha: float = ALPHA) -> float | None:
    """The smallest true mean difference that a paired t test finds with `POWER` probability.

    Args:
        sd: standard deviation of the differences between pairs, in the result's unit.
        n: pairs; fewer than two have none.
        alpha: two-sided significance level.
    """
    return None if n < 2 else sd * _detectable_effect(n, alpha)


@cache
def _detectable_effect(n: int, alpha: float) -> float:
    # One-sided at half the level: only the right sign counts, and for few pairs statsmodels' solver
    # of the two-sided power stops far from the root.
    return float(TTestPower().solve_power(nobs=n, alpha=alpha / 2, power=POWER, alternative="larger"))


@dataclass(frozen=True)
class Variant:
    """One model of a study."""

    name: str
    size: str
    label: str
    """Its attention, as tables name it: "GDA 4:1"."""
    activation: str
    """Its feed-forward block's: "PolyNorm"."""
    row: Mapping[str, Any]
    """As results.json has it."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Variant":
        """From results.json."""
        words = [word for word in row["name"].split() if word != row["activation"]]
        label = " ".join(_WORDS.get(word, word) for word in words)
        return cls(row["name"], row["size"], label, ACTIVATIONS.get(row["activation"], row["activation"]), row)

    @property
    def ratio(self) -> int | None:
        """Signal heads for each noise head of DIFF V1 (1), GDA and attention that is made at
        several; None for other attention.
        """
        attention, ratio = self.row["attention"], self.row.get("ratio")
        if attention in ("diff_v1", "gda"):
            return ratio or 1
        return ratio if is_import_path(attention) else None

    @property
    def signal_heads(self) -> int | None:
        """Query heads that are not noise heads; None where the results do not say."""
        model = self.row.get("model", {})
        heads: int | None = model.get("num_attention_heads")
        return None if heads is None else heads - (model.get("num_noise_heads") or 0)

    @property
    def noise_heads(self) -> int:
        """Query heads that are noise heads."""
        return self.row.get("model", {}).get("num_noise_heads") or 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Softmax attention first, then rising head ratios and noise heads, then the rest."""
        if self.ratio:
            return (1, self.ratio, self.noise_heads)
        return (0 if self.row["attention"].startswith("softmax") else 2, 0, 0)


@dataclass(frozen=True)
class Comparison:
    """A variant against another that it differs from in one thing."""

    variant: Variant
    reference: Variant
    difference: Estimate | None
    """Variant minus reference, paired by seed; None where no seed finished for both."""
    p_holm: float | None
    """The paired test's p value after Holm's correction over all comparisons of the study."""
    shared: Estimate | None
    """The same difference judged by the noise of all variants of its size; None where unknown."""
    shared_p_holm: float | None

    @property
    def significant(self) -> bool:
        """Whether the pair's own seeds do not explain the difference, after correction."""
        return self.p_holm is not None and self.p_holm <= ALPHA

    @property
    def significant_if_equally_noisy(self) -> bool:
        """Whether the noise of all variants together does not explain it, after correction."""
        return self.shared_p_holm is not None and self.shared_p_holm <= ALPHA


def read_results(path: Path) -> dict[str, Any]:
    """Reads a `results.json`.

    Raises:
        UserError: it is missing, no JSON, or not a study's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; give a study's results.json") from None
    except ValueError:
        raise UserError(f"{path} is no JSON; give a study's results.json") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path} holds no results of a study; give a study's results.json")
    return content


class StudyResults:
    """A study's results, asked by name."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        """Takes what `results.json` holds.

        Raises:
            UserError: the results are of another kind.
        """
        if results.get("kind") != KIND:
            raise UserError(f"results of kind {results.get('kind')!r} are no study's; give a study's results.json")
        self.results = results
        self.matched_by = str(results["matching"]["by"]).replace("operations", "flops")  # its former name
        found = [Variant.of(row) for row in results["variants"]]
        self.sizes = list(dict.fromkeys(v.size for v in found))
        self.activations = list(dict.fromkeys(v.activation for v in found))
        self.variants = sorted(
            found, key=lambda v: (self.sizes.index(v.size), self.activations.index(v.activation), *v.order)
        )
        self.designs: list[Mapping[str, Any]] = list(results.get("designs") or ())
        self.runs: list[Mapping[str, Any]] = list(results["runs"])
        self.finished = [run for run in self.runs if run["status"] == "finished"]
        self.seeds = sorted({run["seed"] for run in self.runs})

    def groups(self, size: str | None = None) -> Iterator[list[Variant]]:
        """Variants that differ in nothing but their attention, of one size or of all."""
        for s in self.sizes if size is None else [size]:
            for activation in self.activations:
                if found := [v for v in self.variants if (v.size, v.activation) == (s, activation)]:
                    yield found

    def of_size(self, size: str) -> list[Variant]:
        """Variants of a size."""
        return [v for v in self.variants if v.size == size]

    @cached_property
    def main_group(self) -> list[Variant]:
        """Of the largest models, the group with most head ratios and variants."""
        largest = max(self.variants, key=lambda v: v.row["parameters"]).size
        return max(self.groups(largest), key=lambda g: (len(self.ratios(g)), len(g)))

    def title(self, variant: Variant) -> str:
        """A variant in words, with no more of them than tell it from the others."""
        title = self.title_in_size(variant)
        return f"{title}, {variant.size}" if len(self.sizes) > 1 else title

    def title_in_size(self, variant: Variant) -> str:
        """As :meth:`title`, where others are of the same size."""
        compared = {g[0].activation for g in self.groups() if len(g) > 1}
        if len(compared) > 1 or variant.activation != self.main_group[0].activation:
            return f"{variant.label}, {variant.activation}"
        return variant.label

    def planned(self, variant: Variant) -> list[Mapping[str, Any]]:
        """A variant's runs, finished or not."""
        return [run for run in self.runs if (run["variant"], run["size"]) == (variant.name, variant.size)]

    def runs_of(self, variant: Variant) -> list[Mapping[str, Any]]:
        """A variant's finished runs."""
        return [run for run in self.planned(variant) if run["status"] == "finished"]

    def values(self, variant: Variant, *path: str) -> dict[int, float]:
        """A measure of a variant's finished runs, by seed; runs without it are left out.

        Args:
            variant: whose.
            path: where it stands in a run, such as ("speed", "train_tokens_per_s").
        """
        found = {}
        for run in self.runs_of(variant):
            value: Any = run
            for key in path:
                value = (value or {}).get(key)
            if value is not None and math.isfinite(value):
                found[run["seed"]] = float(value)
        return found

    def estimate(self, variant: Variant, *path: str, unit: float = 1.0) -> Estimate | None:
        """The same over seeds, in a unit."""
        return estimate([x / unit for x in self.values(variant, *path).values()])

    def loss(self, variant: Variant) -> Estimate | None:
        """Validation loss at the end, over seeds."""
        return self.estimate(variant, "validation_loss")

    def seconds_per_token(self, variant: Variant) -> float | None:
        """Of training, where all variants of the size were timed side by side."""
        timed = self.results.get("step_seconds", {}).get(variant.size, {})
        return timed[variant.name] / self.results["micro_batch_tokens"] if variant.name in timed else None

    def by_layer(self, variant: Variant, name: str) -> list[tuple[int, float]]:
        """An attention statistic, mean over seeds: (layer, value), layers counted from 0."""
        runs = [(run.get("attention") or {}).get("layers") or [] for run in self.runs_of(variant)]
        found = []
        for i in range(max(map(len, runs), default=0)):
            values = [v for layers in runs if i < len(layers) and (v := layers[i].get(name)) is not None]
            if values:
                found.append((i, math.fsum(values) / len(values)))
        return found

    def reference(self, group: Sequence[Variant]) -> Variant:
        """What a group is compared with: ratio 1:1, else softmax attention, else its first. Where
        designs have several of 1:1, softmax attention comes before them.
        """
        return min(group, key=lambda v: 0 if v.ratio == 1 and not self.designs else 1 + v.order[0])

    def ratios(self, group: Sequence[Variant]) -> list[Variant]:
        """Those with a head ratio, rising."""
        return sorted((v for v in group if v.ratio), key=lambda v: v.ratio or 0)

    def eligible(self, group: Sequence[Variant]) -> list[Variant]:
        """Those that can be the best: with finished runs, no fewer planned than any other has, and
        no more failed ones.

        Of a variant that diverges, only lucky seeds are left; one that is merely tried has one.
        """
        counts = {}
        for v in group:
            states = [r["status"] for r in self.planned(v)]
            if self.values(v, "validation_loss"):
                counts[v.name] = (-len(states), states.count("failed"))
        return [v for v in group if v.name in counts and counts[v.name] == min(counts.values())]

    def best(self, group: Sequence[Variant]) -> Variant | None:
        """The lowest mean loss of the eligible, on the seeds that all of them finished."""
        eligible = self.eligible(group)
        losses = [self.values(v, "validation_loss") for v in eligible]
        shared = set.intersection(*map(set, losses)) if losses else set()
        means = [np.mean([own[seed] for seed in shared or own]) for own in losses]
        return eligible[int(np.argmin(means))] if eligible else None

    @cached_property
    def noise(self) -> dict[str, Noise | None]:
        """The noise of a run's loss, shared by all variants of a size."""
        found: dict[str, Noise | None] = {}
        for size in self.sizes:
            own = [v for v in self.variants if v.size == size]
            found[size] = shared_noise({v.name: self.values(v, "validation_loss") for v in own})
        return found

    def unequal_noise(self, size: str) -> tuple[list[float], float] | None:
        """The standard deviations of a size's variants between seeds, and the p value of Bartlett's
        test that they are the same; None where fewer than two have two seeds.
        """
        losses = [list(self.values(v, "validation_loss").values()) for v in self.of_size(size)]
        several = [own for own in losses if len(own) > 1]
        sds = [float(np.std(own, ddof=1)) for own in several]
        if len(several) < 2 or not all(sds):
            return None
        return sds, float(stats.bartlett(*several).pvalue)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Variants against their group's reference, between ratios, and PolyNorm against SwiGLU.

        Together they are the one family that p values are corrected for. All pairs of ratios are in
        it, or all of each design, so that the best of them may be compared with the rest although
        it was found by looking.
        """
        pairs = []
        for group in self.groups():
            reference = self.reference(group)
            pairs += [(v, reference) for v in group if v is not reference]
            for others in self._compared_ratios(group):
                new = [(higher, lower) for lower, higher in combinations(others, 2) if lower is not reference]
                pairs += [pair for pair in new if pair not in pairs]
        plain = {(v.size, v.label): v for v in self.variants if v.activation == ACTIVATIONS["silu"]}
        others = [v for v in self.variants if v.activation != ACTIVATIONS["silu"]]
        pairs += [(v, plain[v.size, v.label]) for v in others if (v.size, v.label) in plain]

        own = [self.difference(*pair) for pair in pairs]
        shared = [
            with_noise(d, noise) if d and (noise := self.noise[v.size]) else None
            for d, (v, _) in zip(own, pairs, strict=True)
        ]
        corrected, shared_corrected = (holm([d.p if d else None for d in tests]) for tests in (own, shared))
        columns = zip(pairs, own, corrected, shared, shared_corrected, strict=True)
        return [Comparison(v, r, d, p, judged, shared_p) for (v, r), d, p, judged, shared_p in columns]

    def difference(self, variant: Variant, reference: Variant) -> Estimate | None:
        """A variant's loss less another's, on the seeds that both finished; None without one."""
        return paired(*(self.values(v, "validation_loss") for v in (variant, reference)))

    def _compared_ratios(self, group: Sequence[Variant]) -> list[list[Variant]]:
        """Those of a group that differ in their ratio, rising: all, or of each design."""
        ratios = self.ratios(group)
        if not self.designs:
            return [ratios]
        return [[v for v in ratios if v.name in design["variants"]] for design in self.designs]

    def comparison(self, variant: Variant, reference: Variant) -> Comparison | None:
        """One of the comparisons."""
        return next((c for c in self.comparisons if c.variant == variant and c.reference == reference), None)

    def probed(self, variant: Variant, name: str) -> np.ndarray | None:
        """A measure of the retrieval probe, (seeds, lengths, depths); None if not measured."""
        found = [run["probe"][name] for run in self.runs_of(variant) if name in (run.get("probe") or ())]
        return np.array(found, dtype=float) if found else None

    def retrieval(self, name: str, unit: float) -> list[Estimate | None]:
        """The same of each variant, over all lengths and depths."""
        found = [self.probed(v, name) for v in self.variants]
        return [None if x is None else estimate(list(unit * x.mean(axis=(1, 2)))) for x in found]

    def gain_correlation(self, size: str) -> tuple[float, int] | None:
        """Pearson's correlation of loss and the probe's gain over the runs of a size, and how many
        they are; None of fewer than three.
        """
        runs = [run for run in self.finished if run["size"] == size]
        told = [(run, ((run.get("probe") or {}).get("overall") or {}).get("gain")) for run in runs]
        points = [(gain, run["validation_loss"]) for run, gain in told if gain is not None]
        if len(points) < 3:
            return None
        return float(stats.pearsonr(*zip(*points, strict=True)).statistic), len(points)

    def above_chance(self, name: str) -> list[Variant] | None:
        """Variants whose measure is above chance by more than the choice of questions explains.

        All runs are asked the same, so that a mean over seeds errs as much as one of them; the
        level is corrected for the number of variants.

        Returns:
            None where results do not say how far questions alone lead astray.
        """
        found = []
        for v in self.variants:
            told = [run["probe"] for run in self.runs_of(v) if run.get("probe")]
            overall = [probe.get("overall") or {} for probe in told]
            if told and all(f"{name}_error" in means for means in overall):
                mean, error = (float(np.mean([means[key] for means in overall])) for key in (name, f"{name}_error"))
                found.append((v, mean - (told[0]["chance"] if name == "accuracy" else 0.0), error))
        beyond = float(stats.norm.ppf(1 - ALPHA / len(found))) if found else 0.0
        return [v for v, excess, error in found if excess > beyond * error] if found else None

    def deviations(self, cost: str) -> tuple[float, float]:
        """The least and the largest relative difference in a cost from the variant matched to."""
        name = self.results["matching"].get("reference")
        matched_to = [v for v in self.variants if v.name == name] or self.variants[:1]
        target = {v.size: v.row[cost] for v in matched_to}
        found = [v.row[cost] / target[v.size] - 1 for v in self.variants if v.size in target]
        return min(found), max(found)

    def last_fall(self) -> float:
        """How far the loss fell in the last quarter of training, mean over runs; 0 if unknown."""
        falls = []
        for run in self.finished:
            rows = [(tokens, loss) for tokens, _, loss in run.get("validation") or () if loss is not None]
            if rows and rows[0][0] <= 0.75 * run["tokens"]:
                falls.append(float(np.interp(0.75 * run["tokens"], *np.array(rows).T)) - run["validation_loss"])
        return float(np.mean(falls)) if falls else 0.0
