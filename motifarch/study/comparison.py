"""``--compare OLD.json``: what moved since, and whether it moved further than its noise.

Losses of a study are compared seed by seed where both have the same seeds, and its speeds by
Welch's test over runs, all corrected together after Holm. Figures of a benchmark, repeated within
one process, have moved where the middle halves of old and new repetitions do not meet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from motifarch.errors import UserError
from motifarch.study.benchmark_figures import describe, figures
from motifarch.study.document import Block, Items, Section, Table, Text, named, plural
from motifarch.study.findings import Study
from motifarch.study.statistics import CONFIDENCE, Estimate, estimate, holm, paired, welch

STUDY, ALL = "head_ratio_study", "all_benchmarks"
MOVED, WITHIN, UNKNOWN, SAME = "moved", "within noise", "noise unknown", "the same"
# Measures of a study's runs: name, path, unit, whether more is better.
_MEASURES: tuple[tuple[str, tuple[str, ...], int, bool], ...] = (
    ("validation loss", ("validation_loss",), 1, False),
    ("probe accuracy", ("probe", "overall", "accuracy"), 1, True),
    ("training tokens/s", ("speed", "train_tokens_per_s"), 1, True),
    ("decoding tokens/s", ("speed", "decode_tokens_per_s"), 1, True),
    ("peak memory, MiB", ("speed", "peak_memory_bytes"), 1 << 20, False),
)
# Rows of the table at most, those of a study apart.
_SHOWN = 60


def read_results(path: Path) -> dict[str, Any]:
    """Reads an old results file.

    Raises:
        UserError: it is missing, no JSON, or not of a kind that can be compared.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--compare {path} can't be read: {error.strerror}; give a results.json or all.json") from None
    except ValueError:
        raise UserError(f"--compare {path} is no JSON; give a results.json or all.json") from None
    if not isinstance(content, dict) or not _parts(content):
        raise UserError(
            f"--compare {path} holds no results; give a study's results.json, the all.json of "
            "`motifarch benchmark all`, or a file of benchmarks/results"
        )
    return content


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """What moved from old results to new ones.

    Args:
        new: what a study or ``motifarch benchmark all`` wrote.
        old: the same, or a single benchmark's JSON, of an earlier time.

    Returns:
        For JSON: "old" and "new" (date, commit, machine); "rows" (what, measure, old, new, change
        (relative), noise, verdict ("moved", "within noise", "noise unknown" or "the same"), better
        (null unless it moved)); "notes".

    Raises:
        UserError: they have nothing in common.
    """
    ours, theirs = _parts(new), _parts(old)
    common = [name for name in ours if name in theirs]
    if not common:
        raise UserError(
            f"nothing to compare: the new results hold {', '.join(ours) or 'nothing'}, the old ones "
            f"{', '.join(theirs) or 'nothing'}"
        )
    rows: list[dict[str, Any]] = []
    notes = [f"{name} is only in the {where} results" for name, where in _lone(ours, theirs)]
    for name in common:
        found, more = (_compare_studies if name == "study" else _compare_benchmarks)(ours[name], theirs[name])
        rows += [{"part": name, **row} for row in found]
        notes += [f"{name}: {note}" for note in more]
    about = {when: _about(results) for when, results in (("old", old), ("new", new))}
    if about["old"]["machine"] != about["new"]["machine"]:
        notes.insert(0, f"another machine ({about['old']['machine']} before): times and memory do not compare")
    return {**about, "rows": rows, "notes": notes}


def _parts(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What results hold, by name."""
    if results.get("kind") == STUDY:
        return {"study": results}
    if results.get("kind") == ALL:
        return {part["name"]: part["content"] for part in results["parts"] if part.get("content")}
    return {str(results["benchmark"]): results} if "benchmark" in results else {}


def _lone(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((name, "new") for name in ours if name not in theirs)
    yield from ((name, "old") for name in theirs if name not in ours)


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    environment = results.get("environment") or {}
    git = environment.get("git") or {}
    commit = git.get("commit") if isinstance(git, Mapping) else git
    machine = " ".join(str(environment[k]) for k in ("device", "cpu") if environment.get(k))
    date = environment.get("date") or environment.get("time")
    return {"date": date, "commit": commit, "machine": machine or "unknown"}


def _compare_studies(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    after, before = Study(new), Study(old)
    earlier = {(v.name, v.size): v for v in before.variants}
    rows, tests, fresh = [], [], []
    for v in after.variants:
        was = earlier.pop((v.name, v.size), None)
        if was is None:
            fresh.append(after.title(v))
            continue
        for name, path, unit, more_is_better in _MEASURES:
            values = [
                {s: x / unit for s, x in study.values(who, *path).items()} for study, who in ((after, v), (before, was))
            ]
            if found := _compare_values(*values, exact=path[0] != "speed"):
                row, p = found
                rows.append({"what": v.title, "measure": name, **row, "more_is_better": more_is_better})
                tests.append(p)
    gone = [before.title(v) for v in earlier.values()]
    notes = [f"{what}: {named(names)}" for what, names in (("new variants", fresh), ("variants gone", gone)) if names]
    if differing := [k for k in new["grid"] if new["grid"][k] != old["grid"].get(k)]:
        notes.append(f"the studies' settings differ in {', '.join(differing)}, so losses need not compare")
    for row, p in zip(rows, holm(tests), strict=True):
        row["verdict"] = _verdict(row, p)
        more = row.pop("more_is_better")
        row["better"] = (row["change"] > 0) == more if row["verdict"] == MOVED else None
    return rows, notes


def _compare_values(
    new: Mapping[int, float], old: Mapping[int, float], *, exact: bool
) -> tuple[dict[str, Any], float | None] | None:
    """Old, new and the difference with its noise; None where either is missing.

    Args:
        new: by seed.
        old: by seed.
        exact: whether a seed gives the same value again, so that pairs mean something; times do
            not.
    """
    means = estimate(list(old.values())), estimate(list(new.values()))
    if means[0] is None or means[1] is None:
        return None
    judged: tuple[Estimate, float | None] | None = None
    if exact and set(new) == set(old):
        if found := paired(new, old):
            judged = (found.difference, found.p)
    else:
        judged = welch(list(old.values()), list(new.values()))
    half = judged[0].half if judged else None
    row = _row(means[0].mean, means[1].mean)
    row["noise"] = abs(half / means[0].mean) if half is not None and means[0].mean else None
    return row, judged[1] if judged and half is not None else None


def _row(old: float, new: float) -> dict[str, Any]:
    return {"old": old, "new": new, "change": (new - old) / abs(old) if old else 0.0, "noise": None}


def _verdict(row: Mapping[str, Any], p: float | None) -> str:
    if row["old"] == row["new"] and not row["noise"]:
        return SAME
    if p is None:
        return UNKNOWN
    return MOVED if p <= 1 - CONFIDENCE else WITHIN


def _compare_benchmarks(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    earlier = {f.key: f for f in figures(old) if f.repeated}
    rows, fresh = [], 0
    for f in filter(lambda f: f.repeated, figures(new)):
        was = earlier.pop(f.key, None)
        if was is None:
            fresh += 1
            continue
        row = _row(was.median, f.median)
        width = max(was.upper - was.lower, f.upper - f.lower) / 2
        moved = f.lower > was.upper or f.upper < was.lower
        row |= {"noise": width / was.median if was.median else None, "verdict": MOVED if moved else WITHIN}
        row["better"] = (row["change"] > 0) == f.higher_is_better if moved else None
        what = ", ".join(filter(None, [describe(f.problem, new), f.who]))
        rows.append({"what": what, "measure": f.measure.replace("_", " "), **row})
    notes = []
    if fresh or earlier:
        notes.append(f"{fresh} figures are only in the new results, {len(earlier)} only in the old ones")
    return rows, notes


def section(comparison: Mapping[str, Any]) -> Section:
    """A comparison as a part of a report."""
    rows: Sequence[Mapping[str, Any]] = comparison["rows"]
    old = comparison["old"]
    commit = f", commit {str(old['commit'])[:10]}" if old["commit"] else ""
    moved = sorted((r for r in rows if r["verdict"] == MOVED), key=lambda r: -abs(r["change"]))
    counts = [
        f"{sum(r['verdict'] == verdict for r in rows)} {words}"
        for verdict, words in (
            (MOVED, "moved"),
            (WITHIN, "within their noise"),
            (SAME, "exactly the same"),
            (UNKNOWN, "of unknown noise (one run each, or none)"),
        )
    ]
    against = f"Against results of {old['date'] or 'an unknown date'}{commit}"
    blocks: list[Block] = [Text(f"{against}: {plural(len(rows), 'figure')} compared; {', '.join(counts)}.")]
    if comparison["notes"]:
        blocks.append(Items([f"{note[0].upper()}{note[1:]}." for note in comparison["notes"]]))
    shown = moved[:_SHOWN] + [r for r in rows if r["part"] == "study" and r["verdict"] in (WITHIN, UNKNOWN, SAME)]
    if shown:
        left = f", the {_SHOWN} largest changes" if len(moved) > _SHOWN else ""
        columns = ("What", "Measure", "Verdict", "Old", "New", "Change", "Noise")
        cells = [_cells(r) for r in shown]
        strong = frozenset(i for i, r in enumerate(shown) if r["verdict"] == MOVED)
        blocks.append(Table(f"What moved{left}; a study's figures in full", columns, cells, 3, strong))
    blocks.append(
        Text(
            f"Noise of a study's figures is half of the {CONFIDENCE:.0%} interval of the change, and what moved is "
            "significant after Holm's correction over all of them; noise of a benchmark's is half of the middle half "
            "of its repetitions, and it moved where those of old and new do not meet.",
            note=True,
        )
    )
    return Section("What moved", blocks)


def show(comparison: Mapping[str, Any], console: Console) -> None:
    """Prints what the report says of a comparison."""
    for block in section(comparison).blocks:
        match block:
            case Text():
                console.print(block.text, markup=False)
            case Items():
                for item in block.items:
                    console.print(f"- {item}", markup=False)
            case Table():
                printed = RichTable(title=block.caption, title_justify="left", box=None, pad_edge=False)
                for i, name in enumerate(block.columns):
                    printed.add_column(name, justify="left" if i < block.text_columns else "right")
                for i, row in enumerate(block.rows):
                    printed.add_row(*row, style="bold" if i in block.strong else "")
                console.print(printed)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    verdict = row["verdict"]
    if row["better"] is not None:
        verdict += ": better" if row["better"] else ": worse"
    change = f"{100 * row['change']:+.2f}%".replace("-", "−")
    noise = f"± {100 * row['noise']:.2f}%" if row["noise"] is not None else "–"
    return (row["what"], row["measure"], verdict, f"{row['old']:,.5g}", f"{row['new']:,.5g}", change, noise)
