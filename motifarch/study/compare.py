"""``--compare OLD.json``: what moved since an earlier study, and whether further than its noise.

Losses are compared seed by seed where both studies have the same seeds, else by Welch's test over
runs, as speeds are; all p values are corrected together after Holm.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from motifarch.study.analysis import ALPHA, StudyResults, holm, paired, welch

# Measures of a study's runs: name, path, unit, whether more is better.
_MEASURES: tuple[tuple[str, tuple[str, ...], int, bool], ...] = (
    ("validation loss", ("validation_loss",), 1, False),
    ("probe accuracy", ("probe", "overall", "accuracy"), 1, True),
    ("training tokens/s", ("speed", "train_tokens_per_s"), 1, True),
    ("decoding tokens/s", ("speed", "decode_tokens_per_s"), 1, True),
    ("peak memory, MiB", ("speed", "peak_memory_bytes"), 1 << 20, False),
)


def compare_studies(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """What moved from an old study's results to a new one's.

    Args:
        new: what `results.json` holds.
        old: the same, of an earlier time.

    Returns:
        For JSON: "old" and "new" (date, commit, machine); "rows" (what, measure, old, new, change
        (relative), noise (relative, null where unknown), verdict ("moved", "within noise", "noise
        unknown" or "the same"), better (null unless it moved)); "notes".

    Raises:
        UserError: either is no study's.
    """
    after, before = StudyResults(new), StudyResults(old)
    earlier = {(v.name, v.size): v for v in before.variants}
    shared = [v for v in after.variants if (v.name, v.size) in earlier]
    rows, tests = [], []
    for v in shared:
        for name, path, unit, more_is_better in _MEASURES:
            ours, theirs = after.values(v, *path), before.values(earlier[v.name, v.size], *path)
            if not ours or not theirs:
                continue
            # A seed gives the same loss again, and not the same time.
            pairs = path[0] != "speed" and set(ours) == set(theirs)
            change = paired(ours, theirs) if pairs else welch(list(theirs.values()), list(ours.values()))
            start, end = (float(np.mean(list(runs.values()))) / unit for runs in (theirs, ours))
            half = change.half if change else None
            row: dict[str, Any] = {"what": f"{v.label}, {v.activation}", "measure": name, "old": start, "new": end}
            row["change"] = (end - start) / abs(start) if start else 0.0
            row["noise"] = abs(half / unit / start) if half is not None and start else None
            rows.append((row, more_is_better))
            tests.append(change.p if change else None)
    for (row, more_is_better), p in zip(rows, holm(tests), strict=True):
        row["verdict"] = "noise unknown" if p is None else "moved" if p <= ALPHA else "within noise"
        if row["old"] == row["new"] and not row["noise"]:
            row["verdict"] = "the same"
        row["better"] = (row["change"] > 0) == more_is_better if row["verdict"] == "moved" else None

    about = {when: _about(results) for when, results in (("old", old), ("new", new))}
    fresh = [after.title(v) for v in after.variants if v not in shared]
    known = {(v.name, v.size) for v in after.variants}
    gone = [before.title(v) for v in before.variants if (v.name, v.size) not in known]
    differing = [key for key in new["grid"] if new["grid"][key] != old["grid"].get(key)]
    notes = {
        f"another machine ({about['old']['machine']} before): times and memory do not compare": (
            about["old"]["machine"] != about["new"]["machine"]
        ),
        f"new variants: {', '.join(fresh)}": fresh,
        f"variants gone: {', '.join(gone)}": gone,
        f"the studies' settings differ in {', '.join(differing)}, so losses need not compare": differing,
    }
    return {**about, "rows": [row for row, _ in rows], "notes": [note for note, holds in notes.items() if holds]}


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    environment = results.get("environment") or {}
    machine = " ".join(str(environment[key]) for key in ("device", "cpu") if environment.get(key))
    commit = (environment.get("git") or {}).get("commit")
    return {"date": environment.get("date"), "commit": commit, "machine": machine or "unknown"}
