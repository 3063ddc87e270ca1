"""How a whole study goes: a bar for it and for each run, with the time left; lines where there is
no terminal.
"""

import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from motifarch.study.runs import Run
from motifarch.train.progress import duration


class StudyProgress:
    """Time left is judged by the training FLOPs done since the start, whatever else took its
    time.
    """

    def __init__(self, console: Console, runs: Iterable[Run]) -> None:
        """Starts the clock.

        Args:
            console: where to.
            runs: all of the study's.
        """
        self.console = console
        self._runs = {run.folder: run for run in runs}
        self._steps = {f: r.steps if r.status == "finished" else r.steps_done() for f, r in self._runs.items()}
        self._left_out: set[object] = set()
        self._begin, self._since = self._done(), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._all = self._bars.add_task("the study", total=1.0, state="")
        self._tasks: dict[object, TaskID] = {}
        self._bars.start()

    def _done(self) -> float:
        return sum(self._runs[f].work * steps for f, steps in self._steps.items() if f not in self._left_out)

    def _total(self) -> float:
        return sum(run.work * run.steps for f, run in self._runs.items() if f not in self._left_out)

    def left(self) -> str:
        """The time left over the whole study, in words."""
        done, total = self._done(), self._total()
        if done <= self._begin:
            return "time left unknown yet"
        return f"{duration((time.monotonic() - self._since) * (total - done) / (done - self._begin))} left"

    def say(self, message: str) -> None:
        """Prints a line, above the bars."""
        self.console.print(Text(message), soft_wrap=True)

    def show(self, run: Run, stage: str) -> None:
        """Shows how far a run at work has come."""
        self._steps[run.folder] = steps = run.steps_done()
        if run.folder not in self._tasks:
            self._tasks[run.folder] = self._bars.add_task(run.label, total=run.steps, state="")
        state = f"{steps}/{run.steps}" if stage == "train" else "measuring"
        self._bars.update(self._tasks[run.folder], completed=steps, state=state)
        self._bars.update(self._all, completed=self._done() / max(self._total(), 1.0), state=self.left())

    def end(self, run: Run, outcome: str) -> None:
        """Takes a run's bar away and says what came of it; one that is not finished is no longer
        waited for.
        """
        if run.status == "finished":
            self._steps[run.folder] = run.steps
        else:
            self._left_out.add(run.folder)
        if task := self._tasks.pop(run.folder, None):
            self._bars.remove_task(task)
        self.say(f"{run.label}: {outcome}; {self.left()}")

    def close(self) -> None:
        """Leaves the last state standing."""
        self._bars.stop()
