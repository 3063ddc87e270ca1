"""The report's last part: how variants were made equal, which runs failed, and how to repeat all of
it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from motifarch.study.document import Block, Code, Section, Table, Text, percent
from motifarch.study.findings import Study, Variant

# Folders from the root on, before the name of a file.
_FOLDERS = re.compile(r"(?<![\w.…/:])/(?:[\w.+@~-]+/)+")
_MATCHED = {
    "parameters": "parameters",
    "operations": "training operations a token",
    "flops": "training operations a token",
    "kv_cache": "bytes of key/value cache a token",
}


def matching(study: Study) -> Section:
    """The matched variants with their deviations."""
    about = study.results["matching"]
    by = _MATCHED.get(about["by"], about["by"])
    title = next((study.title(v) for v in study.variants if v.name == about.get("reference")), None)
    to = f" of {title}" if title else ""
    rows = []
    for v in study.variants:
        row, model = v.row, v.row.get("model", {})
        heads, noise = model.get("num_attention_heads"), model.get("num_noise_heads")
        signal = heads - noise if heads and noise else heads
        rows.append(
            (
                study.title(v),
                *(_count(n) for n in (signal, noise, model.get("num_key_value_heads"), model.get("intermediate_size"))),
                _count(row["parameters"]),
                f"{row['training_flops_per_token'] / 1e6:,.2f}",
                _count(row["kv_bytes_per_token"]),
                percent(row["deviation"]),
            )
        )
    columns = ["Variant", "Signal heads", "Noise heads", "KV heads", "Feed-forward width", "Parameters"]
    columns += ["Training MFLOP a token", "KV bytes a token", "Deviation"]
    text = (
        f"Variants have equal {by}, to {100 * about['tolerance']:g}%{to}; one that could not be brought so near was "
        "refused before anything ran. Head width, noise heads and key/value heads stay fixed where they can, signal "
        "heads follow from the ratio, and the feed-forward width takes up the difference."
    )
    return Section("What was made equal", [Text(text), Table(f"Variants, matched by {by}", columns, rows)])


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def failures(study: Study) -> Section | None:
    """Runs that did not finish; None where all did."""
    failed = [run for run in study.runs if run["status"] != "finished"]
    if not failed:
        return None
    titles = {(v.name, v.size): study.title(v) for v in study.variants}
    rows = [
        (
            titles.get((run["variant"], run["size"]), str(run["variant"])),
            str(run["seed"]),
            "not run" if run["status"] == "missing" else str(run["status"]),
            short_error(run.get("error") or "–"),
        )
        for run in failed
    ]
    text = (
        "They count nowhere above: a variant's mean is over the seeds that finished, and a pair counts only where both "
        "did. Where runs fail because training diverges, what is left is the better part of that variant."
    )
    return Section(
        "Failed runs", [Text(text), Table("Runs that did not finish", ("Variant", "Seed", "State", "Reason"), rows, 4)]
    )


def short_error(error: str, limit: int = 400) -> str:
    """The last lines of an error, where the reason is, without the folders of the machine that it
    happened on.
    """
    error = _FOLDERS.sub("…/", " ".join(error.split()))
    return error if len(error) <= limit else f"… {error[-limit:]}"


def reproduction(study: Study) -> Section:
    """Machine, versions, commands, seeds, learning rates and the grid."""
    results = study.results
    blocks: list[Block] = [Code(str(results["command"])), environment_table(results["environment"])]
    blocks.append(_learning_rates(study))
    blocks.append(Text(f"Seeds: {', '.join(map(str, study.seeds))}. Each run's steps and tokens:"))
    runs = sorted({(r["size"], r.get("steps") or 0, r.get("tokens") or 0) for r in study.finished})
    lengths = [(size, f"{steps:,}", f"{tokens:,}") for size, steps, tokens in runs]
    blocks.append(Table("Length of runs", ("Size", "Steps", "Tokens"), lengths))
    grid = yaml.safe_dump(results["grid"], sort_keys=False, allow_unicode=True, width=100).rstrip()
    return Section("To repeat it", blocks, [Section("The study's settings", [Code(grid)])])


def _learning_rates(study: Study) -> Table:
    """Each variant's, and the loss of those that were tried."""
    tried = {(r["variant"], r["size"], r["learning_rate"]): r for r in study.results.get("sweep") or ()}
    rates = sorted({rate for _, _, rate in tried})

    def outcome(v: Variant, rate: float) -> str:
        run = tried.get((v.name, v.size, rate))
        if run is None:
            return "–"
        return f"{run['validation_loss']:.4f}" if run.get("validation_loss") is not None else str(run["status"])

    rows = [
        (
            study.title(v),
            *(outcome(v, rate) for rate in rates),
            f"{v.row['learning_rate']:.3g}" if v.row["learning_rate"] else "–",
            v.row["learning_rate_from"] or "–",
        )
        for v in study.variants
    ]
    caption = "Peak learning rates" + (
        ", and the validation loss of short runs with each that was tried" if rates else ""
    )
    return Table(caption, ("Variant", *(f"{rate:g}" for rate in rates), "Learning rate", "From"), rows)


def environment_table(environment: Mapping[str, Any]) -> Table:
    """Everything that is known of where and with what something ran."""
    rows = [(name.replace("_", " "), value) for name, value in _flat(environment) if value and name != "command"]
    return Table("Machine and versions", ("What", "Value"), rows, 2)


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}: ")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if name.endswith("_bytes") and isinstance(value, int):
                name, text = name.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB"
            found.append((f"{prefix}{name}", text))
    return found
