"""Damages of every file of a run and of its data, each followed by the same command."""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.starts import alive, computed_rows, kill, prepare_inputs, quick_train
from motifarch.counted import counted
from motifarch.files import sha256
from motifarch.train.manifest import checkpoint_name

SAVED, STEPS, EVERY = 8, 12, 4
LIMIT_S = 60.0
"""What takes longer hangs."""
_WRONG: tuple[Any, ...] = (None, [], {}, 7, -1, 1e400, "word", True, "\u0000")
# What every start may write; that no row of metrics is lost is seen elsewhere.
_WRITTEN = (".lock", "metrics.jsonl", "run.json", "loss.png")
# What may be damaged without a trace, so that training goes on otherwise: it belongs to the user.
_UNPROTECTED = ("recipe.yaml",)


@dataclass
class Damaging:
    """The trials of one saved run, and what came out.

    A start either refuses in a message or goes on as if nothing had been damaged; it loses no
    checkpoint and no row of metrics but the damaged ones, and writes through no link.
    """

    folder: Path
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def run(
        self, each: int, say: Callable[[str], object], limit_s: float = float("inf"), *, jobs: int = 2
    ) -> dict[str, Any]:
        """Damages each file so often, or until the time is over."""
        self._whole, self._say, self._until = self.folder / "whole", say, time.monotonic() + limit_s
        prepare_inputs(self._whole, steps=STEPS, every=EVERY)
        self._start(self._whole, steps=SAVED, expect=0)
        self._expected = self._undisturbed()
        files = sorted(
            path.relative_to(self._whole)
            for path in self._whole.rglob("*")
            if path.is_file() and path.name != "log" and "source" not in path.parts
        )
        trials = [(file, number) for number in range(each) for file in files]
        with ThreadPoolExecutor(jobs) as pool:
            for done, _ in enumerate(pool.map(lambda trial: self._try(*trial), trials), 1):
                if done % 50 == 0 and self.counts["damages"] >= done:
                    say(f"{done} of {len(trials)} damages, {counted(len(self.faults), 'fault')}")
        return {"files": len(files), "counts": dict(sorted(self.counts.items())), "faults": sorted(self.faults)}

    def _start(self, folder: Path, steps: int, expect: int | None = None) -> int | None:
        """Trains a copy's run up to a step; the exit status, or None where it hung."""
        options = {
            "--run.output": folder / "run",
            "--run.steps": steps,
            "--checkpoint.keep_last": 0,
            "--data.datasets": json.dumps([{"path": str(folder / "data")}]),
        }
        arguments = [str(text) for option in options.items() for text in option]
        start = quick_train(["train", str(folder / "recipe.yaml"), *arguments], folder / "log")
        status = start.wait(LIMIT_S)
        if status is None and alive([start.pid]):
            kill(start.processes())
        if expect is not None and status != expect:
            raise RuntimeError(f"a run that nothing disturbed failed: {start.log.read_text()[-2000:]}")
        return status

    def _undisturbed(self) -> tuple[list[dict[str, Any]], str]:
        copy = shutil.copytree(self._whole, self.folder / "undisturbed")
        self._start(copy, STEPS, expect=0)
        return computed_rows(copy / "run"), _weights(copy)

    def _try(self, file: Path, number: int) -> None:
        """One damage of one file, on a copy of everything."""
        if time.monotonic() > self._until:
            return
        draw = random.Random(f"{self.seed} {file} {number}")
        copy = shutil.copytree(self._whole, self.folder / f"{'_'.join(file.parts)}_{number}")
        outside = copy / "outside"
        outside.mkdir()
        kinds = [*_KINDS, *([_wrong_type] * 3 if file.suffix in (".json", ".jsonl") else [])]
        # Each kind once, from another one on for each file; then those that have many outcomes.
        turn = number + len(str(file))
        many = [_flip, _flip, _truncate, kinds[-1]]
        damage = kinds[turn % len(kinds)] if number < len(kinds) else draw.choice(many)
        damage(copy / file, draw, outside)
        name = f"{file} {damage.__name__.strip('_')} ({number})"
        before = _hashes(copy)
        rows = [row for row in computed_rows(copy / "run") if row in self._expected[0]]
        status = self._start(copy, STEPS)
        faults = list(self._judge(copy, file, status, before, _hashes(copy)))
        if lost := [row["step"] for row in rows if row not in computed_rows(copy / "run")]:
            faults.append(f"the rows of steps {lost} were lost")
        for fault in faults:
            self._say(f"fault: {name}: {fault}")
        self.faults += [f"{name}: {fault}" for fault in faults]
        self.counts["damages"] += 1
        if faults:
            self.counts["faults"] += 1
        else:
            shutil.rmtree(copy)

    def _judge(
        self, copy: Path, file: Path, status: int | None, before: dict[str, str], after: dict[str, str]
    ) -> Iterator[str]:
        printed = (copy / "log").read_text(errors="replace").partition("finished 8 steps")[2]
        last = (printed.strip().splitlines() or ["nothing"])[-1]
        if status is None:
            yield f"it hung for {LIMIT_S:.0f} s"
        elif status != 0:
            self.counts["refused"] += 1
            if "Traceback" in printed or "unforeseen" in printed or "error: " not in printed:
                yield f"status {status} without a message of its own: {last}"
        elif file.name in _UNPROTECTED:
            self.counts["went on; the file is the user's"] += 1
        else:
            self.counts["went on with equal results"] += 1
            yield from self._compare(copy, file)
        # A checkpoint counts as a whole: one with a damaged file may be made anew.
        replaced = {str(file.parent)} if "checkpoints" in file.parts else set()
        rewritten = {str(file), "log", *(f"run/{name}" for name in _WRITTEN)}
        if file.name in _WRITTEN:
            rewritten |= {f"outside/{file.name}", "outside/precious"}  # as `open` does, through a link
        for path, content in before.items():
            kept = after.get(path) == content
            if not kept and path not in rewritten and not any(path.startswith(folder) for folder in replaced):
                yield f"{path} was {'changed' if path in after else 'removed'}"

    def _compare(self, copy: Path, file: Path) -> Iterator[str]:
        rows, weights = self._expected
        found = computed_rows(copy / "run")
        if file.name == "metrics.jsonl":
            # What was damaged there is gone; all that is written now must be right.
            if [row for row in found if row.get("step", 0) > SAVED] != rows[SAVED:]:
                yield "the rows written since differ from an undisturbed run's"
        elif found != rows:
            yield "the metrics differ from an undisturbed run's"
        if _weights(copy) != weights:
            yield "the last checkpoint differs from an undisturbed run's"


def _weights(copy: Path) -> str:
    last = copy / "run" / "checkpoints" / checkpoint_name(STEPS)
    return " ".join(sha256(path) for path in sorted(last.glob("*.distcp")))


def _hashes(folder: Path) -> dict[str, str]:
    """Every plain file below a folder, with its hash; links are not followed."""
    paths = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {str(path.relative_to(folder)): sha256(path) for path in paths if path.is_file() and not path.is_symlink()}


def _flip(path: Path, draw: random.Random, outside: Path) -> None:
    content = bytearray(path.read_bytes()) or bytearray(1)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, draw: random.Random, outside: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(max(1, len(content)))])


def _delete(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()


def _empty(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(draw.randbytes(max(1, path.stat().st_size)))


def _contents_of_another_file(path: Path, draw: random.Random, outside: Path) -> None:
    root = outside.parent
    others = [p for p in sorted(root.rglob("*")) if p.is_file() and p != path and "source" not in p.parts]
    path.write_bytes(draw.choice(others).read_bytes())


def _folder_instead(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def _link_to_itself_moved(path: Path, draw: random.Random, outside: Path) -> None:
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def _link_to_another_file(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    (outside / "precious").write_text("somebody else's")
    path.symlink_to(outside / "precious")


def _dangling_link(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / "nothing")


def _wrong_type(path: Path, draw: random.Random, outside: Path) -> None:
    """Puts a value of another type into a random place of JSON, sometimes the whole of it."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = draw.randrange(len(lines))
    content = json.loads(lines[at])
    places = list(_places(content, []))
    way = draw.choice(places)
    if not way:
        content = draw.choice(_WRONG)
    else:
        parent = content
        for key in way[:-1]:
            parent = parent[key]
        parent[way[-1]] = draw.choice([wrong for wrong in _WRONG if wrong != parent[way[-1]]])
    lines[at] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")


def _places(content: Any, way: list[Any]) -> Iterator[list[Any]]:
    yield way
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inside)[:20]:
        yield from _places(value, [*way, key])


_KINDS: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    _flip,
    _truncate,
    _delete,
    _empty,
    _garbage,
    _contents_of_another_file,
    _folder_instead,
    _link_to_itself_moved,
    _link_to_another_file,
    _dangling_link,
)
