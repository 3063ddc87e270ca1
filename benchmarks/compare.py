"""What moved from old results to new ones, and whether it moved further than its noise.

    python -m benchmarks.compare OLD.json NEW.json

Each file is a study's results.json, the all.json of benchmarks.run, or one of benchmarks/results.

Figures of a benchmark, repeated within one process, have moved where the middle halves of old and
new repetitions do not meet; their noise is half of the middle half. A study's are compared by
motifarch.study: losses by the paired t test over seeds, speeds by Welch's, all corrected
after Holm; their noise is half of the 95% interval of the change.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.lib import cli, report
from benchmarks.lib.figures import Table, describe, figures
from motifarch.errors import UserError

MOVED, WITHIN = "moved", "within noise"
_SHOWN = 60
"""Rows of the table at most, those of a study apart."""


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        UserError: it is missing, no JSON, or not of a kind that can be compared.
    """
    kinds = "a study's results.json, the all.json of benchmarks.run, or a file of benchmarks/results"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; give {kinds}") from None
    except ValueError:
        raise UserError(f"{path} is no JSON; give {kinds}") from None
    if not isinstance(content, dict) or not _parts(content):
        raise UserError(f"{path} holds no results; give {kinds}")
    return content


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What moved from old results to new ones.

    Returns:
        For JSON: "old" and "new" (date, commit, machine); "rows" (part, what, measure, old, new,
        change (relative), noise, verdict, better (null unless it moved)); "notes".

    Raises:
        UserError: they have nothing in common.
    """
    before, after = _parts(old), _parts(new)
    common = [name for name in after if name in before]
    if not common:
        names = ", ".join(after), ", ".join(before)
        raise UserError(f"nothing to compare: the new results hold {names[0]}, the old ones {names[1]}")
    notes = [f"{name} is only in the new results" for name in after if name not in before]
    notes += [f"{name} is only in the old results" for name in before if name not in after]
    rows: list[dict[str, Any]] = []
    for name in common:
        found, more = (_compare_studies if name == "study" else _compare_benchmarks)(before[name], after[name])
        rows += [{"part": name, **row} for row in found]
        notes += [f"{name}: {note}" for note in more]
    about = {"old": _about(old), "new": _about(new)}
    if about["old"]["machine"] != about["new"]["machine"]:
        notes.insert(0, f"another machine ({about['old']['machine']} before): times and memory do not compare")
    return {**about, "rows": rows, "notes": notes}


def _parts(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What results hold, by name."""
    if results.get("kind") == "head_ratio_study":
        return {"study": results}
    if results.get("kind") == "all_benchmarks":
        return {part["name"]: part["content"] for part in results["parts"] if part.get("content")}
    return {str(results["benchmark"]): results} if "benchmark" in results else {}


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    environment = results["environment"]
    machine = " ".join(str(environment[k]) for k in ("device", "cpu") if environment.get(k))
    return {"date": environment["date"], "commit": (environment.get("git") or {}).get("commit"), "machine": machine}


def _compare_studies(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    # Here, for a GPU machine may lack what a study needs.
    from motifarch.study.compare import compare_studies

    found = compare_studies(new, old)
    return found["rows"], found["notes"]


def _compare_benchmarks(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    before, after = ({f.key: f for f in figures(content) if f.repeated} for content in (old, new))
    rows = []
    for key, now in after.items():
        if (was := before.get(key)) is None:
            continue
        moved = now.lower > was.upper or now.upper < was.lower
        change = now.median / was.median - 1
        rows.append(
            {
                "what": ", ".join(filter(None, [describe(now.problem, new), now.who])),
                "measure": now.measure.replace("_", " "),
                "old": was.median,
                "new": now.median,
                "change": change,
                "noise": max(was.upper - was.lower, now.upper - now.lower) / 2 / was.median,
                "verdict": MOVED if moved else WITHIN,
                "better": (change > 0) == ("per_second" in now.measure) if moved else None,
            }
        )
    lone = len(after.keys() - before.keys()), len(before.keys() - after.keys())
    return rows, [f"{lone[0]} figures are only in the new results, {lone[1]} only in the old ones"] if any(lone) else []


def summary(comparison: Mapping[str, Any]) -> tuple[list[str], Table]:
    """A comparison in sentences, and the table of what moved and of a study's figures."""
    rows, old = comparison["rows"], comparison["old"]
    verdicts = [r["verdict"] for r in rows]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys([MOVED, WITHIN, *verdicts]))
    commit = f", commit {old['commit'][:10]}" if old["commit"] else ""
    lines = [f"Against results of {old['date']}{commit}: {len(rows)} figures compared; {counts}.", *comparison["notes"]]
    moved = sorted((r for r in rows if r["verdict"] == MOVED), key=lambda r: -abs(r["change"]))
    shown = moved[:_SHOWN] + [r for r in rows if r["part"] == "study" and r["verdict"] != MOVED]
    left = f", the {_SHOWN} largest changes" if len(moved) > _SHOWN else ""
    columns = ("What", "Measure", "Verdict", "Old", "New", "Change", "Noise")
    return lines, Table(f"What moved{left}; a study's figures in full", columns, [_cells(r) for r in shown])


def _cells(row: Mapping[str, Any]) -> list[str]:
    better = {None: "", True: ": better", False: ": worse"}[row["better"]]
    noise = "–" if row["noise"] is None else f"± {row['noise']:.2%}"
    values = (f"{row['old']:,.5g}", f"{row['new']:,.5g}", f"{row['change']:+.2%}", noise)
    return [row["what"], row["measure"], row["verdict"] + better, *values]


def show(comparison: Mapping[str, Any], console: Console) -> None:
    """Print a comparison."""
    lines, table = summary(comparison)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if table.rows:
        console.print(table.markdown(), markup=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.bare_parser("benchmarks.compare", __doc__)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--output", type=Path, help="JSON file for the comparison")
    arguments = parser.parse_args(argv)

    def run() -> int:
        comparison = compare(read_results(arguments.old), read_results(arguments.new))
        show(comparison, Console())
        if arguments.output:
            report.write_json(arguments.output, comparison)
        return 0

    return cli.exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
