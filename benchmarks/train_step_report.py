"""The aims, the tables and the picture of the training-step benchmark, from the figures in its JSON
file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.contenders import CONTENDERS, DIFFLLAMAS, LLAMAS
from benchmarks.lib import report

Result = Mapping[str, Any]

GDA = ("gda", "gda_narrow")
# A rival is a model with any of its attentions: the fastest of those measured stands for it, in
# memory too.
RIVALS = {"llama": LLAMAS, "diffllama": DIFFLLAMAS}
_RIVAL_LABELS = {"llama": "Llama", "diffllama": "DiffLlama"}
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Aim:
    """What a GDA 4:1 is meant to reach at a length: a ratio to a rival's figure."""

    rival: str
    """In :data:`RIVALS`."""
    seq_len: int
    measure: str
    """"tokens_per_second" (at least) or "peak_memory_bytes" (below)."""
    bound: float

    def describe(self, model: str) -> str:
        """In words."""
        ours, rival = CONTENDERS[model].label, _RIVAL_LABELS[self.rival]
        if self.measure == "tokens_per_second":
            return f"{ours}: speed at {self.seq_len} tokens is at least {self.bound:g} of {rival}'s"
        return f"{ours}: peak memory at {self.seq_len} tokens is below {rival}'s"


AIMS = (
    Aim("diffllama", 512, "tokens_per_second", 1.0),
    Aim("diffllama", 2048, "tokens_per_second", 1.2),
    Aim("llama", 512, "tokens_per_second", 0.85),
    Aim("llama", 4096, "tokens_per_second", 0.9),
    Aim("diffllama", 512, "peak_memory_bytes", 1.0),
    Aim("diffllama", 2048, "peak_memory_bytes", 1.0),
)


def fastest(results: Sequence[Result], names: Sequence[str]) -> Result | None:
    """The fastest of some models in the results of one precision and length; None where none was
    measured.
    """
    found = [r for r in results if r["model"] in names]
    return max(found, key=lambda r: r["tokens_per_second"]["median"], default=None)


def cells(results: Sequence[Result]) -> dict[tuple[str, int], list[Result]]:
    """The results by precision and length."""
    grouped: dict[tuple[str, int], list[Result]] = {}
    for r in results:
        grouped.setdefault((r["precision"], r["seq_len"]), []).append(r)
    return grouped


def judge(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Hold measured results to the aims, one entry for each aim and precision that was measured."""
    grouped, judged = cells(results), []
    for precision, model, aim in itertools.product(dict.fromkeys(r["precision"] for r in results), GDA, AIMS):
        cell = grouped.get((precision, aim.seq_len), [])
        ours, rival = fastest(cell, [model]), fastest(cell, RIVALS[aim.rival])
        if ours is None or rival is None:
            continue
        if aim.measure == "tokens_per_second":
            ratio = ours[aim.measure]["median"] / rival[aim.measure]["median"]
            met = ratio >= aim.bound
        else:
            ratio = ours[aim.measure] / rival[aim.measure]
            met = ratio < aim.bound
        judged.append(
            {
                "aim": aim.describe(model),
                "precision": precision,
                "seq_len": aim.seq_len,
                "model": model,
                "rival": rival["model"],
                "measure": aim.measure,
                "bound": aim.bound,
                "ratio": ratio,
                "met": met,
            }
        )
    return judged


def rate_unit(content: Mapping[str, Any]) -> tuple[str, float]:
    """What work is shown in, its name and how many operations a second it is."""
    return ("TFLOP/s", 1e12) if content["environment"]["device"] != "cpu" else ("GFLOP/s", 1e9)


def print_results(console: Console, content: Mapping[str, Any]) -> None:
    """The tables: of the models, of speed and memory at each precision and length, of costs;
    failures and aims.
    """
    labels = {m["name"]: m["label"] for m in content["models"]}
    console.print(_models_table(content["models"]))
    for (precision, seq_len), cell in cells(content["results"]).items():
        where = f"{precision}, sequences of {seq_len} tokens"
        console.print(_speed_table(f"{where}: speed", cell, labels, content))
        console.print(_memory_table(f"{where}: peak memory, first step, attention", cell, labels))
    console.print(content["peak"]["text"], soft_wrap=True)
    for costs in content["profiles"]:
        console.print(_costs_table(costs, labels))
    for f in content["failed"]:
        where = f"{f['precision']}, {f['seq_len']} tokens, {f['during']}"
        verdict = "[yellow]stopped[/yellow]" if f["out_of_time"] else "[red]failed[/red]"
        console.print(f"{verdict} {labels[f['model']]} ({where}): {f['reason']}", soft_wrap=True)
    for name, reason in content["left_out"].items():
        console.print(f"left out: {CONTENDERS[name].label}, for {reason}", style="dim", soft_wrap=True)
    if content["not_begun"]:
        names = "; ".join(f"{c['precision']}, {c['seq_len']} tokens" for c in content["not_begun"])
        console.print(f"[yellow]not begun, for the time was over[/yellow]: {names}", soft_wrap=True)
    for aim in content["aims"]:
        verdict = "[green]met[/green]    " if aim["met"] else "[red]not met[/red]"
        console.print(
            f"{verdict}  {aim['precision']:<8} {aim['aim']}: [bold]{aim['ratio']:.3f}[/bold], against "
            f"{labels[aim['rival']]}",
            soft_wrap=True,
        )
    if not content["aims"]:
        console.print("No aim was judged: that takes a full run with a GDA and its rivals at 512 to 4,096 tokens.")


def _models_table(models: Sequence[Result]) -> Any:
    headings = ("model", "library", "attention", "MLP", "MLP\nwidth", "parameters", "of\nLlama")
    rows = [
        (
            *(m["label"], m["library"], m["attention"], m["feed_forward"]),
            *(f"{m['intermediate_size']:,}", f"{m['parameters']:,}", f"{m['relative_parameters']:.3f}"),
        )
        for m in models
    ]
    return report.table("Models", headings, rows, text_columns=4)


def _over_rivals(cell: Sequence[Result], value: Callable[[Result], float]) -> list[tuple[str, Callable[[Result], str]]]:
    """For each rival that was measured, a heading and how a result's figure relates to the
    rival's.
    """
    columns: list[tuple[str, Callable[[Result], str]]] = []

    def over(of: float) -> Callable[[Result], str]:
        return lambda r: f"{value(r) / of:.2f}"

    for rival, heading in (("llama", "of\nLlama"), ("diffllama", "of Diff-\nLlama")):
        if (best := fastest(cell, RIVALS[rival])) is not None:
            columns.append((heading, over(value(best))))
    return columns


def _speed_table(title: str, cell: Sequence[Result], labels: Mapping[str, str], content: Mapping[str, Any]) -> Any:
    unit, scale = rate_unit(content)
    relative = _over_rivals(cell, lambda r: float(r["tokens_per_second"]["median"]))
    with_mfu = any(r["mfu"] is not None for r in cell)
    headings = ["model", "tokens\nper s", "middle\nhalf", *(h for h, _ in relative), f"model\n{unit}"]
    rows = [
        (
            labels[r["model"]],
            f"{r['tokens_per_second']['median']:,.0f}",
            f"±{report.half_spread(r['tokens_per_second']):.1f}%",
            *(over(r) for _, over in relative),
            f"{r['model_tflops'] * 1e12 / scale:,.1f}",
            *([f"{r['mfu']:.1%}"] if with_mfu else []),
        )
        for r in cell
    ]
    return report.table(title, [*headings, *(["MFU"] if with_mfu else [])], rows)


def _memory_table(title: str, cell: Sequence[Result], labels: Mapping[str, str]) -> Any:
    relative = _over_rivals(cell, lambda r: float(r["peak_memory_bytes"]))
    headings = ["model", "attention operator", "peak\nMiB", *(h for h, _ in relative), "first\nstep s"]
    rows = [
        (
            labels[r["model"]],
            attention_name(r["attention_operators"]),
            f"{r['peak_memory_bytes'] / _MEBIBYTE:,.0f}",
            *(over(r) for _, over in relative),
            f"{r['first_step_seconds']:.1f}",
        )
        for r in cell
    ]
    return report.table(title, headings, rows, text_columns=2)


def attention_name(operators: Sequence[str]) -> str:
    """Attention operators for people; a formula whose maps lie in memory has none."""
    names = [name.partition("::")[2].strip("_").removeprefix("scaled_dot_product_") for name in operators]
    return ", ".join(names) or "plain products"


def _costs_table(costs: Result, labels: Mapping[str, str]) -> Any:
    title = (
        f"{labels[costs['model']]}, {costs['precision']}, {costs['seq_len']} tokens: largest costs, {costs['kind']} of "
        f"{costs['seconds'] * 1e3:,.1f} ms a step"
    )
    rows = [
        (_shorten(c["name"]), f"{c['seconds'] * 1e3:,.2f}", f"{c['calls']:,.0f}", f"{c['share']:.1%}")
        for c in costs["largest"]
    ]
    rows.append(("other", f"{costs['other'] * costs['seconds'] * 1e3:,.2f}", "", f"{costs['other']:.1%}"))
    return report.table(title, ("", "ms", "calls", "share"), rows)


def _shorten(name: str, width: int = 48) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """The picture: speed relative to Llama (without it, to the first model), work and memory, a row
    a precision.
    """
    names = [m["name"] for m in content["models"] if any(r["model"] == m["name"] for r in content["results"])]
    palette = itertools.cycle(report.COLOURS)
    colours = {CONTENDERS[n].label: report.GREY if n == "llama" else next(palette) for n in names}
    grouped = cells(content["results"])
    precisions = list(dict.fromkeys(precision for precision, _ in grouped))
    figure, axes = report.figure(len(precisions), 3, size=(19, 1.6 + 3.6 * len(precisions)))
    for precision, line in zip(precisions, axes, strict=True):
        found = {seq_len: cell for (p, seq_len), cell in grouped.items() if p == precision}
        _draw_line(line, precision, found, names, colours, content)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(6, len(texts)), frameon=False)
    compiled = ", each layer compiled" if content["settings"]["compile"] else ""
    heading = f"A full training step at equal parameters: {content['shape']['text']}{compiled}"
    subtitle = f"{content['peak']['text']}\n{report.describe(content['environment'])}"
    figure.suptitle(f"{heading}\n{subtitle}", fontsize=11)
    report.write_plot(path, figure)


def _draw_line(
    axes: Sequence[Any],
    precision: str,
    found: Mapping[int, Sequence[Result]],
    names: Sequence[str],
    colours: Mapping[str, str],
    content: Mapping[str, Any],
) -> None:
    """One precision's three panels; a model that has no figure at a length has no bar there."""
    unit, scale = rate_unit(content)
    groups = [f"{seq_len:,} tokens" for seq_len in found]
    base = {seq_len: fastest(cell, LLAMAS) or cell[0] for seq_len, cell in found.items()}
    speed: dict[str, list[float]] = {label: [] for label in colours}
    ends: dict[str, list[tuple[float, float]]] = {label: [] for label in colours}
    rates: dict[str, list[float]] = {label: [] for label in colours}
    memory: dict[str, list[float]] = {label: [] for label in colours}
    for (seq_len, cell), name in itertools.product(found.items(), names):
        label, r, of = CONTENDERS[name].label, fastest(cell, [name]), base[seq_len]["tokens_per_second"]["median"]
        spread = r["tokens_per_second"] if r else dict.fromkeys(("median", "lower", "upper"), 0.0)
        speed[label].append(spread["median"] / of)
        ends[label].append((spread["lower"] / of, spread["upper"] / of))
        rates[label].append(r["model_tflops"] * 1e12 / scale if r else 0.0)
        memory[label].append(r["peak_memory_bytes"] / (1 << 30) if r else 0.0)
    left, middle, right = axes
    report.grouped_bars(left, groups, speed, colours=colours, errors=ends, reference=1.0, label=_value)
    rival = "the fastest Llama" if any(n in LLAMAS for n in names) else CONTENDERS[names[0]].label
    left.set_ylabel(f"tokens/s relative to {rival}")
    left.set_title(f"{precision}: speed (whiskers: middle half of the steps)", fontsize=10)
    peak = content["peak"]["bf16_flops"] if precision == "bf16" else None

    def rate(value: float) -> str:
        share = f"\n{value * scale / peak:.0%}" if peak and value else ""
        return f"{value:,.{0 if value >= 100 else 1}f}{share}" if value else ""

    report.grouped_bars(middle, groups, rates, colours=colours, label=rate)
    middle.set_ylim(top=1.1 * middle.get_ylim()[1])  # labels of two lines
    middle.set_ylabel(f"model {unit}")
    middle.set_title(f"{precision}: work done{', and MFU' if peak else ''}", fontsize=10)
    report.grouped_bars(right, groups, memory, colours=colours, label=_value)
    right.set_ylabel("peak memory (GiB)")
    right.set_title(f"{precision}: memory", fontsize=10)


def _value(value: float) -> str:
    return f"{value:.2f}" if value else ""
