"""The report's third part: where attention goes, and what models cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from motifarch.study import charts
from motifarch.study.document import Picture, Section, Table, Text, decimals, named, number, sentence
from motifarch.study.findings import Study, Variant
from motifarch.study.report_losses import hollow, kind, written
from motifarch.study.statistics import CONFIDENCE, estimate

# Attention statistics by layer; what is not named here is shown under its own name.
_STATISTICS = {
    "first_token_share": "share of attention on the first token",
    "signal_first_token_share": "the same, signal map alone",
    "noise_first_token_share": "the same, noise map alone",
    "entropy": "entropy of attention, nats",
    "signal_entropy": "entropy of the signal map, nats",
    "noise_entropy": "entropy of the noise map, nats",
    "negative_share": "share of attention that is negative",
    "cancelled_share": "share of attention that cancels out",
    "lambda": "lambda",
    "outlier_ratio": "largest activation over their root mean square",
    "attention_outlier_ratio": "the same, attention's output",
    "largest_logit": "largest attention logit",
    "kurtosis": "kurtosis of the residual stream",
    "attention_kurtosis": "kurtosis of attention's output",
}
_DRAWN = ("first_token_share", "entropy", "cancelled_share", "lambda", "outlier_ratio", "largest_logit")
_MEBIBYTE = 1 << 20


def attention(study: Study) -> Section:
    """Attention statistics by layer."""
    names = list(dict.fromkeys(n for r in study.finished for layer in _layers(r) for n in layer))
    if not names:
        return Section("Attention statistics", [Text("No finished run has attention statistics.")])
    explained = (
        "On validation rows, mean over heads, queries and seeds, a point for each layer. Differential attention has "
        "negative weights: shares and entropy are those of the weights' absolute values, scaled to sum to one, so that "
        "variants compare. "
    )
    uniform = [r["attention"] for r in study.finished if r.get("attention", {}).get("uniform_entropy") is not None]
    if uniform:
        explained += (
            f"Attention spread evenly would have {uniform[0]['uniform_first_token_share']:.3f} on the first token and "
            f"an entropy of {uniform[0]['uniform_entropy']:.2f} nats."
        )
    sections = []
    for title, group in study.panels():
        pictures = [p for n in names if n in _DRAWN and (p := _layer_picture(study, n, group))]
        sections.append(Section(f"By layer: {title}", [*pictures, _table(study, names, title, group)]))
    if len(sections) == 1:
        return Section("Attention statistics", [Text(explained), *sections[0].blocks])
    return Section("Attention statistics", [Text(explained)], sections)


def _layers(run: Mapping[str, Any]) -> list[dict[str, float | None]]:
    return (run.get("attention") or {}).get("layers") or []


def _layer_picture(study: Study, name: str, group: Sequence[Variant]) -> Picture | None:
    series = [
        charts.Series(study.label_in(group, v), kind(study, v), study.by_layer(v, name), hollow(v)) for v in group
    ]
    series = [s for s in series if s.points]
    if not series:
        return None
    title = f"{sentence(_label(name))}, by layer"
    digits = decimals(y for s in series for _, y in s.points)
    told = "; ".join(f"{s.label} {number(s.points[0][1], digits)} to {number(s.points[-1][1], digits)}" for s in series)
    description = f"{title}, from the first layer to the last: {told}."
    below = any(y < -1e-6 for s in series for _, y in s.points)
    svg = charts.lines(title, description, series, "layer", "", height=288, zero=below, whole=True)
    return Picture(title, description, svg=svg)


def _label(name: str) -> str:
    return _STATISTICS.get(name, name.replace("_", " "))


def _table(study: Study, names: Sequence[str], title: str, group: Sequence[Variant]) -> Table:
    rows = []
    for name in [n for n in _STATISTICS if n in names] + [n for n in names if n not in _STATISTICS]:
        points = [[y for _, y in study.by_layer(v, name)] for v in group]
        means = [float(np.mean(ys)) if ys else None for ys in points]
        rows.append((sentence(_label(name)), *_figures(means)))
    spikes = [estimate(list(study.values(v, "attention", "gradient_norm_spikes").values())) for v in group]
    rows.append(("Gradient norm spikes in a run", *(f"{s.mean:.1f}" if s else "–" for s in spikes)))
    where = f", {title}" if len(study.panels()) > 1 else ""
    return Table(f"Mean over layers{where}", ("Statistic", *(study.label_in(group, v) for v in group)), rows)


def _figures(values: Sequence[float | None]) -> list[str]:
    digits = decimals(v for v in values if v is not None)
    return ["–" if v is None else number(v, digits) for v in values]


def costs(study: Study) -> Section:
    """Speed, memory and key/value bytes."""
    measures: list[tuple[str, tuple[str, ...], float]] = [
        ("Training, tokens/s", ("speed", "train_tokens_per_s"), 1),
        ("Model TFLOP/s", ("speed", "model_tflops"), 1),
        ("Peak memory, MiB", ("speed", "peak_memory_bytes"), _MEBIBYTE),
        ("Decoding, tokens/s", ("speed", "decode_tokens_per_s"), 1),
        ("KV bytes a token", ("speed", "kv_bytes_per_token"), 1),
    ]
    columns = []
    for _, path, unit in measures:
        found = [estimate([x / unit for x in study.values(v, *path).values()]) for v in study.variants]
        digits = decimals(e.mean for e in found if e)
        columns.append([written(e, digits) for e in found])
    rows = [(study.title(v), *(column[i] for column in columns)) for i, v in enumerate(study.variants)]
    prefill = sorted({r["speed"]["prefill_tokens"] for r in study.finished if r.get("speed", {}).get("prefill_tokens")})
    after = (
        f" Decoding is one sequence after a prompt of {named([f'{n:,}' for n in prefill])} tokens." if prefill else ""
    )
    note = (
        f"Mean over runs ± half of the {CONFIDENCE:.0%} interval. Times hold what else the machine did: use the kernel "
        f"and training-step benchmarks to compare speeds.{after}"
    )
    caption = "Speed, memory and cache"
    return Section(
        "Speed, memory and cache", [Table(caption, ("Variant", *(m[0] for m in measures)), rows), Text(note, note=True)]
    )
