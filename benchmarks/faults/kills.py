"""Random SIGKILLs of a run on two processes, each followed by the same command again."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.starts import (
    Start,
    alive,
    computed_rows,
    kill,
    prepare_inputs,
    quick_torchrun,
    torchrun,
)
from motifarch.files import sha256
from motifarch.train.manifest import find_newest, step_of

ORPHANS_AFTER_S = 10.0
STEPS, EVERY = 200, 2
TARGETS = ("launcher", "rank", "all")
_BAD = ("checkpoints lost", "rows lost", "orphans", "results that differ", "starts that failed")


@dataclass
class Killing:
    """The loop's state, and what it counts.

    Whatever is killed, the run's newest complete checkpoint must never be older than before, the
    rows of its steps must be those of a run that nothing disturbed, and so must its end.
    """

    folder: Path
    seed: int = 0
    torchrun_every: int = 10
    """One of so many starts is torchrun's own, which takes ten times as long."""
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_BAD, 0)))
    faults: list[str] = field(default_factory=list)

    def run(self, kills: int, say: Callable[[str], object], limit_s: float = float("inf")) -> dict[str, Any]:
        """Kills so often, or until the time is over, and lets the last run come to its end."""
        self._draw, self._say = random.Random(self.seed), say
        self._watching: list[threading.Thread] = []
        self._recipe = prepare_inputs(self.folder, steps=STEPS, every=EVERY)
        self._expected = self._undisturbed()
        until, number = time.monotonic() + limit_s, 0
        while self.counts["kills"] < kills and time.monotonic() < until:
            number += 1
            self._one_run(self.folder / f"run_{number}", kills, until)
        for thread in self._watching:
            thread.join()
        return {"counts": dict(sorted(self.counts.items())), "faults": self.faults}

    def _undisturbed(self) -> tuple[list[dict[str, Any]], str]:
        output = self.folder / "undisturbed"
        start = torchrun(self._arguments(output), self.folder / "undisturbed.log")
        if start.wait(600) != 0:
            raise RuntimeError(f"the undisturbed run failed: {start.log.read_text()[-2000:]}")
        return computed_rows(output), _weights(output)

    def _arguments(self, output: Path) -> list[str]:
        return [str(self._recipe), "--run.output", str(output)]

    def _one_run(self, output: Path, kills: int, until: float) -> None:
        """Starts until the run has come to its end."""
        saved = failed = 0
        while True:
            self.counts["starts"] += 1
            how = torchrun if self.counts["starts"] % self.torchrun_every == 0 else quick_torchrun
            start = how(self._arguments(output), output.with_suffix(".log"))
            killing = self.counts["kills"] < kills and time.monotonic() < until
            killed = killing and self._kill(start, output)
            if not killed:
                status = start.wait(600)
                if status == 0:
                    break
                failed += 1
                self.counts["starts that failed"] += 1
                self._fault(f"start {self.counts['starts']} in {output.name} ended with status {status}")
                if failed == 3:
                    break
            saved = self._check(output, saved)
            if self.counts["kills"] % 10 == 0:
                self._say(f"{self.counts['kills']} kills, {self.counts['starts']} starts, {len(self.faults)} faults")
        self.counts["runs"] += 1
        rows, weights = self._expected
        self.counts["results that differ"] += computed_rows(output) != rows or _weights(output) != weights
        if computed_rows(output) != rows:
            self._fault(f"the metrics of {output.name} differ from an undisturbed run's")
        if _weights(output) != weights:
            self._fault(f"the last checkpoint of {output.name} differs from an undisturbed run's")

    def _kill(self, start: Start, output: Path) -> bool:
        """Kills part of a start at a random time; False where it had ended before."""
        draw = self._draw
        partial = "checkpoints/*.partial"
        moment = draw.choices(["start", "step", "save"], [2, 4, 3])[0]
        before = {path.name for path in output.glob(partial)}
        first_row = len(computed_rows(output))
        reached: dict[str, Callable[[], bool]] = {
            "start": lambda: True,
            "step": lambda: len(computed_rows(output)) != first_row,
            "save": lambda: bool({path.name for path in output.glob(partial)} - before),
        }
        # A step takes some 30 ms and a save some 100.
        delay = draw.uniform(0, {"start": 4.0, "step": 1.5, "save": 0.1}[moment])
        skipped = draw.randrange(8) if moment == "save" else 0  # saves to let pass
        while not reached[moment]():
            if start.poll() is not None:
                return False
            time.sleep(0.002)
        for _ in range(skipped):
            name = next(iter({path.name for path in output.glob(partial)}), "")
            while start.poll() is None and (output / "checkpoints" / name).exists() and name:
                time.sleep(0.002)
            while start.poll() is None and not any(output.glob(partial)):
                time.sleep(0.002)
        time.sleep(delay)
        processes = start.processes()
        ranks = processes[1:]
        target = draw.choice(TARGETS)
        if start.poll() is not None or (target == "rank" and not ranks):
            return False
        during_save = any(output.glob(partial))
        kill({"launcher": [start.pid], "rank": [draw.choice(ranks or [start.pid])], "all": processes}[target])
        killed_at = time.monotonic()
        self.counts.update(["kills", f"kills of {target}", *(["kills during a save"] if during_save else [])])
        watch = threading.Thread(target=self._watch_orphans, args=(processes, killed_at, target))
        watch.start()
        self._watching.append(watch)
        # Sometimes the next start comes at once, beside what is still ending.
        if target == "launcher" and draw.random() < 0.5:
            self.counts["starts beside what was ending"] += 1
        else:
            while alive(processes) and time.monotonic() < killed_at + 60:
                time.sleep(0.01)
        return True

    def _watch_orphans(self, processes: list[int], killed_at: float, target: str) -> None:
        while (left := alive(processes)) and time.monotonic() < killed_at + ORPHANS_AFTER_S:
            time.sleep(0.05)
        if left:
            self.counts["orphans"] += len(left)
            self._fault(f"{len(left)} processes were left 10 s after the kill of {target}")

    def _check(self, output: Path, saved: int) -> int:
        """Checks that nothing saved is lost; returns the newest complete checkpoint's step."""
        newest = find_newest(output)
        step = (step_of(newest) or 0) if newest else 0
        if step < saved:
            self.counts["checkpoints lost"] += 1
            self._fault(f"the newest checkpoint of {output.name} is of step {step}, and was of {saved}")
        if (missing := step - len([row for row in computed_rows(output) if row["step"] <= step])) > 0:
            self.counts["rows lost"] += missing
            self._fault(f"{missing} rows of metrics up to step {step} of {output.name} are missing")
        return step

    def _fault(self, text: str) -> None:
        self._say(f"fault: {text}")
        self.faults.append(text)


def _weights(output: Path) -> str:
    """One hash of the last checkpoint's shards."""
    newest = find_newest(output)
    if newest is None or step_of(newest) != STEPS:
        return "none"
    return " ".join(sha256(path) for path in sorted(newest.glob("*.distcp")))
