"""Trains parts of a run again, and compares: bit by bit, or, on another kind of machine, by how far
the weights end from where they ended.

Which parts are drawn from a seed that is given afterwards, so that whoever made the run could not
know. A cheat in a share p of the intervals between saves is found with probability 1 - (1 - p)^N by
N of them.
"""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from motif_kernels.impl.cpu.row_formulas import VARIABLE
from motifarch.checkpoint_reader import CheckpointReader
from motifarch.counted import counted
from motifarch.errors import UserError, first_line
from motifarch.field_types import is_import_path
from motifarch.ledger.chain import Entry, Ledger
from motifarch.ledger.link import CHECKPOINT
from motifarch.ledger.tensor_hash import whole_hash
from motifarch.models.motif.own_attention import registered
from motifarch.train.lineage import manifest_seal
from motifarch.train.manifest import checkpoints_folder, complete_checkpoints, find_newest
from motifarch.train.run_folder import METRICS, read_metrics
from motifarch.train.saved_hashes import HASHES, WEIGHTS, roots
from motifarch.verify.findings import Findings

BOUND = 0.05
"""Elsewhere: the largest distance from the saved weights, as a part of how far they moved."""
_COMPARED = ("loss", "grad_norm", "learning_rate")
_DECIDE_BITS = ("versions", "devices", "cpu", "cpu_flags", "threads", "ranks", "layout", "compute", "cpu_kernels")
"""What an environment says that decides a result's last bits, beside the code."""


@dataclass(frozen=True)
class Interval:
    """From one save to the next."""

    start: Entry
    end: Entry
    parent: Path | None
    """The checkpoint of the start; None of first weights, which the seed makes."""
    saved: Path | None
    """The checkpoint of the end, if it is still there."""

    @property
    def name(self) -> str:
        """In words."""
        return f"steps {self.start.step + 1} to {self.end.step}"


def intervals(folder: Path, chain: Sequence[Entry]) -> list[Interval]:
    """Those of a chain, the newest entry first, that can be trained again: their start is there."""
    there = {manifest_seal(path): path for path in complete_checkpoints(checkpoints_folder(folder), hashes=False)}
    found = []
    for end, start in pairwise(chain):
        parent = there.get(start.manifest or "")
        from_seed = start.step == 0 and start.link.get("origin") is None
        if end.link["kind"] == CHECKPOINT and (parent is not None or from_seed):
            found.append(Interval(start, end, parent, there.get(end.manifest or "")))
    return found[::-1]


def drawn(choices: Sequence[Interval], count: int, seed: str, head: Entry) -> list[Interval]:
    """So many of them, all alike likely, by a seed and the chain's newest entry."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {head.hash}".encode()).digest())
    return sorted(random.Random(number).sample(list(choices), min(count, len(choices))), key=lambda i: i.end.step)


def confidence(share: float, count: int, total: int) -> float:
    """The probability that `count` intervals out of `total` have one of a share of bad ones."""
    bad = max(1, math.ceil(share * total))
    return 1.0 - math.comb(total - bad, min(count, total)) / math.comb(total, min(count, total))


def replay(
    interval: Interval,
    ledger: Ledger,
    work: Path,
    *,
    ranks: int | None = None,
    data: Sequence[Path] = (),
    show: Callable[[str], object] = print,
) -> Findings:
    """Trains an interval again. Where code, versions, machine and ranks are those of the run, every
    bit has to be the same; elsewhere the weights may be off by `BOUND`.

    Args:
        interval: which.
        ledger: the run's, for the recipe.
        work: a folder for it, which is made.
        ranks: processes; None takes as many as there were.
        data: where the prepared data is now, in the recipe's order; none: where it was.
        show: told what goes on.
    """
    found, check = Findings(), f"Trained again, {interval.name} end in the weights that were saved."
    try:
        recipe, environment = (ledger.kept(interval.end.link[name]) for name in ("recipe", "environment"))
    except (ValueError, KeyError) as error:
        found.add(check, unknown=f"the recipe is not on record: {error}")
        return found
    if reason := _refusal(recipe, environment, ranks):
        found.add(check, unknown=reason)
        return found
    if interval.parent is not None and (wrong := other_tensors(interval.parent, interval.start)):
        found.add(check, [wrong])
        return found
    show(f"training {interval.name} again")
    work.mkdir(parents=True)
    output = work / "run"
    (work / "recipe.yaml").write_text(yaml.safe_dump(_recipe(recipe, interval, output, data)), encoding="utf-8")
    processes = ranks or environment["ranks"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "motifarch.train", str(work / "recipe.yaml")]
    variables = {VARIABLE: environment["cpu_kernels"]} if "cpu_kernels" in environment else {}
    with (work / "log").open("wb") as log:
        status = subprocess.run(command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT, check=False)
    again = find_newest(output) if status.returncode == 0 else None
    if again is None:
        tail = (work / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        found.add(check, unknown=f"it could not be trained: {' '.join(tail)}")
        return found
    own = roots(json.loads((again / HASHES).read_text(encoding="utf-8")))
    if own == {name: interval.end.link[name] for name in own}:
        found.add(f"{check} Every bit is the same.")
    else:
        here = Ledger.read(output)
        others = differences(environment, here.kept(here.entries[-1].link["environment"]))
        _compare_closely(found, check, interval, again, others)
    _compare_rows(found, interval, output, exact=found.found[-1].check.endswith("same."))
    return found


def _refusal(recipe: Any, environment: Any, ranks: int | None) -> str | None:
    """Why what a ledger asks for is not done here: whoever made it may ask for anything."""
    try:
        attention, processes = recipe["model"]["attention_type"], ranks or environment["ranks"]
        if not isinstance(environment["code"]["sources"], str) or type(processes) is not int:
            raise TypeError("of another kind")
    except (KeyError, TypeError) as error:
        return f"recipe or environment can't be used: {first_line(error)}"
    if is_import_path(str(attention)):
        try:
            registered(attention)  # a ledger imports no code by itself
        except ValueError as error:
            return first_line(error)
    here = torch.cuda.device_count() or os.cpu_count() or 1
    if ranks is None and processes > here:
        return f"it ran on {processes:,} processes, and here is room for {here}; give --ranks"
    return None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two environments differ that decides a result's last bits."""
    found = [name for name in _DECIDE_BITS if one.get(name) != other.get(name)]
    return (["code"] if one["code"]["sources"] != other["code"]["sources"] else []) + found


def _recipe(recipe: Mapping[str, Any], interval: Interval, output: Path, data: Sequence[Path]) -> dict[str, Any]:
    content = json.loads(json.dumps(recipe))
    datasets = content["data"]["datasets"]
    if data and len(data) != len(datasets):
        raise UserError(f"--data names {counted(len(data), 'folder')}, but the recipe has {len(datasets)}; name each")
    for dataset, path in zip(datasets, data, strict=False):
        dataset["path"] = str(path.resolve())
    content["run"] |= {
        "output": str(output),
        "resume": str(interval.parent.resolve()) if interval.parent else "none",
        "stop_at": interval.end.step,
    }
    content["checkpoint"] |= {"mirror": None}
    content["log"] = {"every": 1, "tensorboard": False, "tracker": "none"}
    return content


def _compare_closely(found: Findings, check: str, interval: Interval, again: Path, others: Sequence[str]) -> None:
    if not others:
        found.add(check, ["they do not, on the same machine, versions and ranks, where every bit would be the same"])
        return
    if interval.saved is None:
        found.add(check, [f"the hashes of {interval.name} differ, and what was saved is no longer there to compare"])
        return
    if wrong := other_tensors(interval.saved, interval.end):
        found.add(check, [wrong])
        return
    distance = update_distance(interval.parent, interval.saved, again)
    close = (
        f"{check} Not bit by bit, for {', '.join(others)} differ: they are {distance:.2g} of the way apart that "
        f"training moved them (at most {BOUND})."
    )
    found.add(close, [] if distance <= BOUND else [f"{distance:.2g} is more"])


def other_tensors(checkpoint: Path, entry: Entry) -> str | None:
    """What is wrong where a checkpoint holds other tensors than its entry says; all are read."""
    reader, hashes = CheckpointReader(checkpoint), {}
    for name, about in reader.tensors.items():
        content = {name: torch.empty(about.size, dtype=about.properties.dtype)}
        reader.load(content, no_dist=True)
        hashes[name] = whole_hash(content[name]).hex()
    same = roots(hashes) == {name: entry.link[name] for name in ("weights", "state")}
    return None if same else f"{checkpoint.name} holds other tensors than its entry says"


def update_distance(before: Path | None, saved: Path, again: Path) -> float:
    """How far two checkpoints' weights are apart, as a part of how far the first one's moved."""
    readers = [CheckpointReader(path) for path in (saved, again, before) if path is not None]
    apart = moved = 0.0
    for name, about in readers[0].tensors.items():
        if not name.startswith(WEIGHTS):
            continue
        values = []
        for reader in readers:
            content = {name: torch.empty(about.size, dtype=about.properties.dtype)}
            reader.load(content, no_dist=True)
            values.append(content[name].double())
        apart += float((values[0] - values[1]).square().sum())
        moved += float((values[0] - (values[2] if before is not None else 0.0)).square().sum())
    return math.sqrt(apart / moved) if moved else math.inf if apart else 0.0


def _compare_rows(found: Findings, interval: Interval, output: Path, *, exact: bool) -> None:
    """Losses and rates of the replay beside those on record."""
    run = interval.parent or interval.saved
    if run is None:
        return
    recorded = {row["step"]: row for row in read_metrics(run.parent.parent / METRICS)}
    problems = []
    for row in read_metrics(output / METRICS):
        other = recorded.get(row["step"])
        if row["step"] <= interval.start.step or other is None:
            continue
        for name in _COMPARED:
            one, two = row.get(name), other.get(name)
            same = one == two
            if not exact and one is not None and two is not None:
                same = math.isclose(one, two, rel_tol=BOUND, abs_tol=1e-6)
            if not same:
                problems.append(f"{name} of step {row['step']} is {two} on record and {one} again")
    found.add(f"{METRICS} has what {interval.name} give when they are trained again.", problems)
