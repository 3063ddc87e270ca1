"""How healthy routed experts are: figures of each layer for a run's metrics, and warnings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from motifarch.layers import MixtureOfExperts
from motifarch.layers.mixture_of_experts import MoEStatistics

Figures = dict[str, list[float | None]]
"""Of each decoder layer, None where it has no experts or the figure means nothing."""


@dataclass(frozen=True)
class Bound:
    """Past which value a figure is worth a warning."""

    field: str
    figure: str
    bad: float
    good: float
    """A layer that was warned of is warned of again only after it was here."""
    meaning: str
    fix: str

    def is_bad(self, value: float | None) -> bool:
        """Whether to warn."""
        return value is not None and (value < self.bad if self.bad <= self.good else value > self.bad)

    def is_good(self, value: float | None) -> bool:
        """Whether the layer has recovered."""
        return value is not None and (value >= self.good if self.bad <= self.good else value <= self.good)


BOUNDS = (
    Bound(
        "router_load_min_median",
        "the smallest load over the median one",
        bad=0.3,
        good=0.7,
        meaning="an expert starves",
        fix="raise experts.bias_rate or experts.balance_loss",
    ),
    Bound(
        "router_weight_min_median",
        "the smallest norm of an expert's down_proj over the median one",
        bad=0.5,
        good=0.8,
        meaning="an expert dies",
        fix="give it tokens: raise experts.bias_rate or experts.balance_loss",
    ),
    Bound(
        "router_routed_shared_rms",
        "the routed experts' RMS over the shared one's",
        bad=0.3,
        good=0.4,
        meaning="routing hardly matters",
        fix="raise model.route_scale",
    ),
    Bound(
        "router_output_cosine",
        "the largest cosine of two experts' mean outputs",
        bad=0.8,
        good=0.5,
        meaning="they do the same",
        fix="raise experts.router_noise, or lower experts.balance_loss",
    ),
    Bound(
        "router_output_peak",
        "an output's largest number over its RMS, the mean of all tokens,",
        bad=10.0,
        good=8.0,
        meaning="outliers grow",
        fix="raise experts.magnitude_loss, or lower its threshold",
    ),
)
"""Thresholds of Motif-3's report (arXiv 2608.09119, table 3); what counts as recovered of RMS and
peak, and the fixes, are ours."""


class RouterHealth:
    """Collects figures of a model's routed experts from one report to the next, on the device.

    Without experts it does nothing.
    """

    def __init__(self, layers: Mapping[int, MixtureOfExperts], num_layers: int) -> None:
        """Takes the layers with experts by their index, of so many; their statistics begin here."""
        self._layers = dict(layers)
        self._num_layers = num_layers
        self._loads: Tensor | None = None
        self._warned: set[tuple[str, int]] = set()
        for layer in self._layers.values():
            layer.reset_statistics()

    def record_outputs(self, on: bool) -> None:
        """Whether the next step's outputs are recorded, for the cosine and the peak."""
        for layer in self._layers.values():
            layer.record_expert_outputs = on

    def add(self, loads: Sequence[Tensor] | None) -> None:
        """Notes a step's loads: each layer's tokens by expert, (num_experts,), over all ranks."""
        if loads:
            step = torch.stack(list(loads))
            self._loads = step if self._loads is None else self._loads + step

    @torch.no_grad()
    def read(self) -> Figures:
        """The figures since the last call, over all ranks, which call it together."""
        if self._loads is None:
            return {}
        layers = list(self._layers.values())
        biases = torch.stack([layer.expert_bias for layer in layers])
        norms = torch.stack([_matrix_norms(layer.experts.down_proj) for layer in layers])
        statistics = [_summed_statistics(layer) for layer in layers]
        figures = {
            "router_load_max_mean": self._loads.amax(dim=1) / self._loads.mean(dim=1),
            "router_load_min_median": _min_over_median(self._loads, at_least=1.0),
            "router_entropy": torch.stack([s.entropy for s in statistics]),
            "router_bias_range": biases.amax(dim=1) - biases.amin(dim=1),
            "router_routed_shared_rms": torch.stack([s.routed_rms / s.shared_rms for s in statistics]),
            "router_weight_min_median": _min_over_median(norms),
        }
        recorded = [
            (s.expert_outputs, s.peak) for s in statistics if s.expert_outputs is not None and s.peak is not None
        ]
        if recorded:
            figures["router_output_cosine"] = torch.stack([_largest_cosine(outputs) for outputs, _ in recorded])
            figures["router_output_peak"] = torch.stack([peak for _, peak in recorded])
        for layer in layers:
            layer.reset_statistics()
        self._loads = None
        read = torch.stack([values.double() for values in figures.values()]).tolist()
        return {name: self._by_layer(values) for name, values in zip(figures, read, strict=True)}

    def _by_layer(self, values: list[float]) -> list[float | None]:
        found = {i: value for i, value in zip(self._layers, values, strict=True) if math.isfinite(value)}
        return [found.get(i) for i in range(self._num_layers)]

    def warnings(self, figures: Figures) -> list[str]:
        """A line for each figure that went bad in a layer that was not warned of yet."""
        lines = []
        for bound in BOUNDS:
            values = dict(enumerate(figures.get(bound.field, [])))
            self._warned -= {(bound.field, i) for i, value in values.items() if bound.is_good(value)}
            bad = {i: v for i, v in values.items() if bound.is_bad(v) and (bound.field, i) not in self._warned}
            self._warned |= {(bound.field, i) for i in bad}
            if bad:
                below = bound.bad <= bound.good
                worst = (min if below else max)(bad, key=lambda i: bad[i] or 0.0)
                others = f", and of {len(bad) - 1} more layers past it" if len(bad) > 1 else ""
                lines.append(
                    f"experts of layer {worst}: {bound.figure} is {bad[worst]:.3g}, {'below' if below else 'above'} "
                    f"{bound.bad}{others}: {bound.meaning}; {bound.fix}"
                )
        return lines


def _min_over_median(values: Tensor, at_least: float = 0.0) -> Tensor:
    """(layers, experts) -> (layers,); a median is taken for `at_least` so much."""
    return values.amin(dim=1) / values.quantile(0.5, dim=1).clamp(min=at_least)


def _matrix_norms(weight: Tensor) -> Tensor:
    """(experts, ...), sharded or not -> each expert's norm, (experts,), on all ranks."""
    norms = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
    return norms.full_tensor() if isinstance(norms, DTensor) else norms


def _summed_statistics(layer: MixtureOfExperts) -> MoEStatistics:
    """A layer's statistics over all ranks."""
    if dist.is_initialized():
        for sums in (layer.statistic_sums, layer.expert_output_sums, layer.output_peak_sums):
            if sums is not None:
                dist.all_reduce(sums)
    return layer.statistics()


def _largest_cosine(outputs: Tensor) -> Tensor:
    """(experts, E) -> (); an expert without tokens is like none."""
    directions = torch.nn.functional.normalize(outputs, dim=1)
    return (directions @ directions.T).fill_diagonal_(-1).amax()
