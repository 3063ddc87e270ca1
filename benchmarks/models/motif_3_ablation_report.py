"""What the ablation's runs say: statistics of the study, tables and a figure."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.lib import report
from motifarch.counted import counted
from motifarch.study.analysis import (
    ALPHA,
    Estimate,
    detectable_difference,
    estimate,
    holm,
    paired,
    shared_noise,
    with_noise,
)
from motifarch.study.report import number, p_value, percent, with_interval

BASE = "base"


def by_seed(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Bits per byte of each variant by seed; runs that diverged are left out."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["bits_per_byte"] is not None:
            found.setdefault(run["model"], {})[run["seed"]] = run["bits_per_byte"]
    return found


def statistics(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each variant's mean, and its difference from the base, as the study of head ratios has them.

    Args:
        runs: finished ones: model, seed, bits_per_byte.

    Returns:
        For JSON: "means", "noise" (of one run, from all variants together) and "differences": of
        each variant the paired difference with its own test ("own") and judged by the noise of all
        ("shared"), both with p values after Holm's correction over all variants, and the smallest
        difference that the own test finds with 80% probability ("detectable").
    """
    losses = by_seed(runs)
    means = [
        {"model": name} | dataclasses.asdict(mean) for name in losses if (mean := estimate([*losses[name].values()]))
    ]
    names = [name for name in losses if name != BASE]
    own = [paired(losses[name], losses.get(BASE, {})) for name in names]
    noise = shared_noise(losses)
    shared = [with_noise(each, noise) if each and noise else None for each in own]
    corrected, shared_corrected = (holm([each.p if each else None for each in tests]) for tests in (own, shared))
    differences = []
    for name, each, p, judged, shared_p in zip(names, own, corrected, shared, shared_corrected, strict=True):
        if each:
            row: dict[str, Any] = {"model": name, "own": dataclasses.asdict(each), "p_holm": p}
            row |= {"shared": dataclasses.asdict(judged) if judged else None, "shared_p_holm": shared_p}
            row["detectable"] = detectable_difference(each.sd, each.n) if each.sd else None
            differences.append(row)
    return {"means": means, "noise": dataclasses.asdict(noise) if noise else None, "differences": differences}


def verdict(row: Mapping[str, Any]) -> str:
    """What a difference says, after correction."""
    word = "worse" if row["own"]["mean"] > 0 else "better"
    if (row["p_holm"] or 1) <= ALPHA:
        return word
    return f"{word}, if equally noisy" if (row["shared_p_holm"] or 1) <= ALPHA else "within noise"


def print_tables(content: Mapping[str, Any], console: Console) -> None:
    """What was compared, what came out, and what so many seeds can tell."""
    console = Console(width=max(console.width, 110), highlight=False)  # narrower terminals fold its lines
    setup, losses = content["setup"], by_seed(content["runs"])
    labels = {row["model"]: row["label"] for row in content["models"]}
    tokens = setup["steps"] * setup["batch"] * setup["seq_len"]
    title = f"Equal FLOPs by the experts' width; {tokens:,} tokens, learning rate {setup['learning_rate']:g}"
    costs = [
        (
            row["label"],
            str(row["fields"]["moe_intermediate_size"]),
            f"{row['flops_per_token'] / 1e6:.3f}",
            percent(row["deviation"]),
            f"{row['parameters']:,}",
            f"{row['active_parameters']:,}",
            f"{row['cache_bytes_per_token']:,}",
        )
        for row in content["models"]
    ]
    columns = ["", "experts'\nwidth", "MFLOP\na token", "of the\nbase", "parameters", "active", "cache, bytes\na token"]
    console.print(report.table(title, columns, costs))

    means = {row.pop("model"): Estimate(**row) for row in map(dict, content["means"])}
    rows = [
        (
            labels[name],
            *(f"{losses[name][seed]:.4f}" if seed in losses[name] else "–" for seed in setup["seeds"]),
            with_interval(mean),
        )
        for name, mean in means.items()
    ]
    columns = ["", *(f"seed {seed}" for seed in setup["seeds"]), "mean"]
    console.print(report.table("Bits per byte; ± is half of a 95% interval", columns, rows))

    rows = [
        (
            labels[row["model"]],
            with_interval(Estimate(**row["own"]), sign=True),
            p_value(row["p_holm"]),
            with_interval(Estimate(**row["shared"]), sign=True) if row["shared"] else "–",
            p_value(row["shared_p_holm"]),
            number(row["detectable"]),
            verdict(row),
        )
        for row in content["differences"]
    ]
    columns = ["", "by its own\nseeds", "p", "by the noise\nof all", "p", "detectable\n(80%)", ""]
    console.print(report.table("Less the base, paired by seed; p after Holm", columns, rows))
    if noise := content["noise"]:
        found = f"{noise['sd']:.4f} ({counted(noise['freedom'], 'degree')} of freedom)"
        console.print(f"Noise of a run, from all together once variant and seed are taken out: {found}.")
    if tried := [(run["learning_rate"], run["bits_per_byte"]) for run in content["sweep"]]:
        told = ", ".join(f"{rate:g}: {'diverged' if bits is None else format(bits, '.4f')}" for rate, bits in tried)
        edge = setup["learning_rate"] in (min(tried)[0], max(tried)[0])
        console.print(f"Learning rates tried on the base: {told}{'; the best is at an end' if edge else ''}.")
    diverged = [f"{run['model']}, seed {run['seed']}" for run in content["runs"] if run["bits_per_byte"] is None]
    if diverged:
        console.print(f"Diverged, and in no figure: {'; '.join(diverged)}.")


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Each seed's bits per byte on the way less the base's, and the differences at the end."""
    figure, ((ways, ends),) = report.figure(1, 2, size=(11, 4))
    labels = {row["model"]: row["label"] for row in content["models"]}
    names = [row["model"] for row in content["differences"]]
    colours = dict(zip(names, (report.COLOURS[i] for i in (0, 2, 3, 4, 5, 6)), strict=False))
    curves = {(run["model"], run["seed"]): run["curve"] for run in content["runs"]}
    for (name, seed), curve in curves.items():
        if name in colours and (BASE, seed) in curves:
            points = [
                (tokens / 1e6, bits - base)
                for (tokens, bits), (_, base) in zip(curve, curves[BASE, seed], strict=True)
                if bits is not None and base is not None
            ]
            ways.plot(*zip(*points, strict=True), color=colours[name], linewidth=1, marker=".", markersize=4)
    ways.set(xlabel="million tokens", ylabel="bits per byte less the base's, a line a seed")
    losses = by_seed(content["runs"])
    for at, row in enumerate(reversed(content["differences"])):
        name, own, shared = row["model"], row["own"], row["shared"]
        style: dict[str, Any] = {"color": colours[name], "fmt": "o"}
        ends.errorbar(own["mean"], at, xerr=own["half"] or 0, capsize=4, **style)
        if shared and shared["half"]:
            ends.errorbar(shared["mean"], at, xerr=shared["half"], elinewidth=6, alpha=0.4, **style)
        seeds = [losses[name][seed] - losses[BASE][seed] for seed in losses[name] if seed in losses[BASE]]
        ends.plot(seeds, [at - 0.2] * len(seeds), ".", color=report.GREY)
    ends.set_yticks(range(len(names)), [labels[name] for name in reversed(names)])
    for words, name in zip(ends.get_yticklabels(), reversed(names), strict=True):
        words.set_color(colours[name])
    ends.set_xlabel(
        "the same at the end (right of 0: worse); grey: seeds\nthin: 95% by its own seeds; thick: noise of all"
    )
    ends.set_ylim(-0.6, len(names) - 0.4)
    ends.locator_params(axis="x", nbins=6)
    ways.axhline(0, color="0.3", linewidth=1)
    ends.axvline(0, color="0.3", linewidth=1)
    for axes in (ways, ends):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report.describe(content["environment"]), fontsize=8)
    report.write_plot(path, figure)
