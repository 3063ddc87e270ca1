"""The report's second part: what models retrieve, where their attention goes, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from motifarch.study import charts
from motifarch.study.document import Block, Picture, Pictures, Section, Table, Text, named
from motifarch.study.findings import Study, Variant
from motifarch.study.report_losses import hollow, kind, written
from motifarch.study.statistics import CONFIDENCE, estimate

# What the probe measures: name, how it is written, in which unit.
_PROBED: dict[str, tuple[str, Callable[[float], str], str]] = {
    "accuracy": ("Accuracy", lambda v: f"{100 * v:.0f}", "per cent of questions answered right"),
    "gain": ("Gain", lambda v: f"{v:.2f}".replace("-", "−"), "nats that the context adds to the right value"),
    "binding": ("Binding", lambda v: f"{v:.2f}".replace("-", "−"), "nats that the right name adds to its value"),
}
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


def probe(study: Study) -> Section:
    """Heat maps of the retrieval probe, and its means."""
    told = [run["probe"] for run in study.finished if run.get("probe")]
    if not told:
        return Section("Retrieval probe", [Text("No finished run has a retrieval probe.")])
    about = told[0]
    shown = [name for name in _PROBED if name in about]
    intro = (
        f"{about['task']}; {about['samples']} samples for each length, and chance is {about['chance']:.0%}. Lengths "
        "are in tokens; depth is how far into the context the line lies."
    )
    blocks: list[Block] = [Text(_upper(intro)), _probe_table(study, shown)]
    # What reading shows at all comes last to chance; a model at chance is no reason to draw noise twice.
    for name in shown[:2]:
        label, _, unit = _PROBED[name]
        pictures = [p for v in study.variants if (p := _heat_map(study, v, name, about))]
        blocks.append(Pictures(pictures, f"{label} by length and depth, mean over seeds: {unit}."))
    return Section("Retrieval probe", blocks)


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _probe_values(study: Study, variant: Variant, name: str) -> np.ndarray | None:
    """(seeds, lengths, depths)."""
    found = [run["probe"][name] for run in study.runs_of(variant) if run.get("probe") and name in run["probe"]]
    return np.array(found, dtype=float) if found else None


def _probe_table(study: Study, shown: Sequence[str]) -> Table:
    rows = []
    for v in study.variants:
        cells = []
        for name in shown:
            values = _probe_values(study, v, name)
            scale, digits = (100, 1) if name == "accuracy" else (1, 3)
            mean = estimate(list(scale * values.mean(axis=(1, 2)))) if values is not None else None
            cells.append(written(mean, digits))
        rows.append((study.title(v), *cells))
    units = {"accuracy": "Accuracy, %", "gain": "Gain, nats", "binding": "Binding, nats"}
    caption = f"Retrieval over all lengths and depths, mean over seeds ± half of the {CONFIDENCE:.0%} interval"
    return Table(caption, ("Variant", *(units[name] for name in shown)), rows)


def _heat_map(study: Study, variant: Variant, name: str, about: Mapping[str, Any]) -> Picture | None:
    values = _probe_values(study, variant, name)
    if values is None:
        return None
    label, write, unit = _PROBED[name]
    mean = values.mean(axis=0)
    lengths, depths = [f"{n:,}" for n in about["lengths"]], [f"{100 * d:g}%" for d in about["depths"]]
    told = "; ".join(
        f"{length} tokens: {', '.join(write(float(x)) for x in row)}" for length, row in zip(lengths, mean, strict=True)
    )
    title = study.title(variant)
    description = f"{label} of {title}, {unit}, at depths {named(depths)}. {told}."
    every = [found for v in study.variants if (found := _probe_values(study, v, name)) is not None]
    top = 1.0 if name == "accuracy" else max(float(max(x.mean(axis=0).max() for x in every)), 1e-9)
    svg = charts.heat_map(f"{label}: {title}", description, mean.tolist(), lengths, depths, top=top, write=write)
    return Picture(title, description, svg=svg)


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
    for size, activation, group in study.groups():
        pictures = [p for n in names if n in _DRAWN and (p := _layer_picture(study, n, group))]
        title = study.group_title(size, activation)
        sections.append(Section(f"By layer: {title}", [*pictures, _statistics_table(study, names, group, title)]))
    if len(sections) == 1:
        return Section("Attention statistics", [Text(explained), *sections[0].blocks])
    return Section("Attention statistics", [Text(explained)], sections)


def _layers(run: Mapping[str, Any]) -> list[dict[str, float | None]]:
    return (run.get("attention") or {}).get("layers") or []


def _by_layer(study: Study, variant: Variant, name: str) -> list[tuple[float, float]]:
    """(layer, mean over seeds), layers counted from 0."""
    runs = [_layers(run) for run in study.runs_of(variant)]
    found = []
    for i in range(max(map(len, runs), default=0)):
        values = [v for layers in runs if i < len(layers) and (v := layers[i].get(name)) is not None]
        if values:
            found.append((float(i), float(np.mean(values))))
    return found


def _layer_picture(study: Study, name: str, group: Sequence[Variant]) -> Picture | None:
    series = [charts.Series(v.label, kind(study, v), _by_layer(study, v, name), hollow(v)) for v in group]
    series = [s for s in series if s.points]
    if not series:
        return None
    label = _STATISTICS.get(name, name.replace("_", " "))
    title = f"{_upper(label)}, by layer"
    told = "; ".join(f"{s.label} {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series)
    description = f"{title}, from the first layer to the last: {told}."
    svg = charts.lines(title, description, series, "layer", "", height=320, whole=True)
    return Picture(title, description, svg=svg)


def _statistics_table(study: Study, names: Sequence[str], group: Sequence[Variant], title: str) -> Table:
    columns = [n for n in _STATISTICS if n in names] + [n for n in names if n not in _STATISTICS]
    rows = []
    for name in columns:
        cells = []
        for v in group:
            points = _by_layer(study, v, name)
            cells.append(f"{np.mean([y for _, y in points]):.3g}" if points else "–")
        rows.append((_upper(_STATISTICS.get(name, name.replace("_", " "))), *cells))
    spikes = [estimate(list(study.values(v, "attention", "gradient_norm_spikes").values())) for v in group]
    rows.append(("Gradient norm spikes in a run", *(f"{s.mean:.1f}" if s else "–" for s in spikes)))
    return Table(f"Mean over layers, {title}", ("Statistic", *(v.label for v in group)), rows)


def costs(study: Study) -> Section:
    """Speed, memory and key/value bytes."""
    measures: list[tuple[str, tuple[str, ...], float, int]] = [
        ("Training, tokens/s", ("speed", "train_tokens_per_s"), 1, 0),
        ("Model TFLOP/s", ("speed", "model_tflops"), 1, 3),
        ("Peak memory, MiB", ("speed", "peak_memory_bytes"), _MEBIBYTE, 0),
        ("Decoding, tokens/s", ("speed", "decode_tokens_per_s"), 1, 1),
        ("KV bytes a token", ("speed", "kv_bytes_per_token"), 1, 0),
    ]
    rows = []
    for v in study.variants:
        cells = []
        for _, path, unit, digits in measures:
            found = estimate([x / unit for x in study.values(v, *path).values()])
            if found is None:
                cells.append("–")
            elif found.half:
                cells.append(f"{found.mean:,.{digits}f} ± {found.half:,.{digits}f}")
            else:
                cells.append(f"{found.mean:,.{digits}f}")
        rows.append((study.title(v), *cells))
    prefill = sorted({r["speed"]["prefill_tokens"] for r in study.finished if r.get("speed", {}).get("prefill_tokens")})
    after = (
        f" Decoding is one sequence after a prompt of {named([f'{n:,}' for n in prefill])} tokens." if prefill else ""
    )
    note = (
        f"Mean over runs ± half of the {CONFIDENCE:.0%} interval. Runs were trained one after another or side by side, "
        f"so times hold what else the machine did; use the kernel and training-step benchmarks to compare "
        f"speeds.{after}"
    )
    caption = "Speed, memory and cache"
    return Section(
        "Speed, memory and cache", [Table(caption, ("Variant", *(m[0] for m in measures)), rows), Text(note, note=True)]
    )
