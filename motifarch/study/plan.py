"""All runs of a study, and `study.json`: its grid and what was decided once for all runs."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

from motifarch.data import DataShape
from motifarch.environment import environment
from motifarch.errors import UserError
from motifarch.files import write_json
from motifarch.study.analysis import FORMAT, KIND
from motifarch.study.grid import GRIDS, Grid, SizeSpec
from motifarch.study.launch import Launcher
from motifarch.study.matching import TOLERANCE, Matched
from motifarch.study.pool import Slots
from motifarch.study.runs import Run, choose_rates, with_model
from motifarch.study.side_by_side import fastest_attention, step_seconds
from motifarch.train.precision import choose_compute
from motifarch.train.recipe import Recipe

STUDY, RESULTS = "study.json", "results.json"
_PACKAGES = ("motifarch", "torch", "triton", "transformers", "tokenizers", "datasets", "numpy")
_DECIDED = ("kind", "format", "grid", "data", "compute", "softmax_attention", "step_seconds", "starts")
"""What results.json says as study.json does."""
_OF_OUTCOME = {"variant", "size", "seed", "status", "error"}
"""What a row of results.json has beside a run's result."""


class StudyPlan:
    """All runs of a study, and `study.json`: its grid and what was decided once for all runs."""

    def __init__(self, path: Path, grid: Grid, matched: Sequence[Matched]) -> None:
        """Opens the folder for a grid.

        Where it holds a results.json alone, as one brings it from another machine, that study goes
        on: its finished runs are not run again.

        Raises:
            UserError: it belongs to another grid.
        """
        self.path, self.grid, self.matched = path, grid, matched
        own = _as_json(grid)
        self.content: dict[str, Any] = {"kind": KIND, "format": FORMAT, "grid": own}
        self._carried: dict[str, Any] | None = None
        found = next((path / name for name in (STUDY, RESULTS) if (path / name).is_file()), None)
        if found is None:
            return
        try:
            content = json.loads(found.read_text(encoding="utf-8"))
            # Fields that there were not then have their defaults.
            before = _as_json(GRIDS.parse(content["grid"]))
            if found.name == RESULTS:
                self._carried, content = content, _decided(content)
            self.content = content
        except (ValueError, KeyError, TypeError, UserError):
            raise UserError(f"{found} is damaged; give another --output, or delete that folder") from None
        if changed := list(_differences(before, own)):
            shown = "; ".join(f"{name} is {now!r}, was {was!r}" for name, was, now in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{path} holds a study of another grid: {shown}{more}. Give this one an --output of its own, or the "
                "former grid again"
            )

    def _take_up(self, results: Mapping[str, Any]) -> None:
        """Notes the finished runs of a results.json whose folders are elsewhere."""
        for kind, runs in (("sweep", self.sweep), ("runs", self.runs)):
            which = ["variant", "size", "seed", "steps", *(["learning_rate"] if kind == "sweep" else [])]
            rows = {tuple(row[name] for name in which): row for row in results[kind] if row["status"] == "finished"}
            for run in runs:
                about = run.outcome()
                row = rows.get(tuple(about[name] for name in which))
                if row is not None and about["status"] == "missing":
                    run.folder.mkdir(parents=True, exist_ok=True)
                    run.finish({name: value for name, value in row.items() if name not in _OF_OUTCOME})

    @cached_property
    def sizes(self) -> list[SizeSpec]:
        """The one with the fewest parameters first: larger ones may take its learning rates."""
        least = {m.size.name: m.costs["parameters"] for m in reversed(self.matched)}
        return sorted(self.grid.sizes, key=lambda size: least[size.name])

    @cached_property
    def sweep(self) -> list[Run]:
        """The runs that try learning rates, of each variant at the smallest size or at all."""
        grid, smallest = self.grid, self.sizes[0]
        everywhere = grid.learning_rate.transfer == "sweep"
        runs = []
        for m, rate in product((m for m in self.matched if everywhere or m.size == smallest), grid.learning_rate.sweep):
            steps = grid.steps(m.size, grid.learning_rate.tokens or max(1, (m.size.tokens or grid.tokens) // 4))
            of_size = self.path / "sweep" / (m.size.name if everywhere else "")
            folder = of_size / m.variant.folder / f"lr_{rate:g}"
            runs.append(Run(m, grid.seeds[0], steps, rate, folder, sweep=True))
        return runs

    @property
    def runs(self) -> list[Run]:
        """The runs that are compared; a rate that is not chosen yet is NaN."""
        runs = []
        # By seeds, so that a study that is cut short has compared all variants on the first ones.
        by_size = ([m for m in self.matched if m.size == size] for size in self.sizes)
        for seed, m in chain.from_iterable(product(self.grid.seeds, found) for found in by_size):
            if m.variant.seeds and seed not in m.variant.seeds:
                continue
            folder = self.path / "runs" / m.size.name / m.variant.folder / f"seed_{seed}"
            rate = float(self._rate(m).get("learning_rate", math.nan))
            runs.append(Run(m, seed, self.grid.steps(m.size), rate, folder))
        return runs

    def _rate(self, matched: Matched) -> dict[str, Any]:
        rates = self.content.get("learning_rates", {})
        return rates.get(matched.size.name, {}).get(matched.name, {})  # type: ignore[no-any-return]

    def note(self, name: str, value: Any) -> None:
        """Writes a value under a name of study.json."""
        self.content[name] = value
        write_json(self.path / STUDY, self.content)

    def begin(self, command: str, fingerprint: str, sequences: DataShape, slots: Slots, launcher: Launcher) -> None:
        """Writes down what the study runs on; what was decided at an earlier start stays.

        Raises:
            UserError: the data are not those that it was begun with.
        """
        if self._carried is not None:
            self._take_up(self._carried)
        device = torch.device(slots.device)
        asked = self.grid.recipe.precision.compute
        decided: dict[str, Callable[[], Any]] = {
            "data": lambda: {"path": self.grid.data.path, "fingerprint": fingerprint},
            "reference": lambda: self.grid.reference_variant.name,
            # Once for all runs: on a CPU speed decides it, and two runs might measure differently.
            "compute": lambda: launcher.call(choose_compute, device) if asked == "auto" else asked,
        }
        # After the precision, in which they are timed.
        decided["softmax_attention"] = lambda: self._time_softmax(sequences, slots, launcher)
        if not self.sweep:
            decided["learning_rates"] = lambda: choose_rates(self.grid, self.matched, self.sizes[0])
        for name, decide in decided.items():
            if name not in self.content:
                self.note(name, decide())
        if (data := self.content["data"])["fingerprint"] != fingerprint:
            raise UserError(
                f"{self.grid.data.path} holds other data (fingerprint {fingerprint[:12]}) than the study in "
                f"{self.path} was begun with ({data['fingerprint'][:12]}); give that data, or another --output"
            )
        start = launcher.call(environment, command, device, _PACKAGES) | dataclasses.asdict(slots)
        self.note("starts", [*self.content.get("starts", []), start])

    def _time_softmax(self, sequences: DataShape, slots: Slots, launcher: Launcher) -> dict[str, str]:
        """The fastest attention of each size's first softmax variant."""
        found = {}
        for m in reversed(self.matched):
            if m.variant.is_softmax and self.grid.recipe.model.attn_implementation is None:
                how = (sequences, torch.device(slots.device), self.content["compute"], slots.threads)
                found[m.size.name] = launcher.call(fastest_attention, self._recipe(m), *how)
        return found

    def time_steps(self, sequences: DataShape, slots: Slots, launcher: Launcher) -> None:
        """Notes the seconds of a micro-batch of each variant, taken side by side, once; of sizes
        that one process holds.
        """
        found = self.content.get("step_seconds", {})
        for size in self.sizes:
            if size.name not in found and size.ranks == 1:
                recipes = {m.name: self._recipe(m) for m in self.matched if m.size == size}
                how = (sequences, torch.device(slots.device), self.content["compute"], slots.threads)
                found[size.name] = launcher.call(step_seconds, recipes, *how)
                self.note("step_seconds", found)

    def _recipe(self, m: Matched) -> Recipe:
        """What decides how fast a variant trains."""
        attention = self.content.get("softmax_attention", {}).get(m.size.name)
        return with_model(self.grid.recipe, m, attention)

    def open_sweep(self, size: SizeSpec, status: str) -> list[Run]:
        """A size's runs of the sweep with a status, of variants whose rate is not chosen yet."""
        own = (run for run in self.sweep if run.matched.size == size)
        return [run for run in own if not self._rate(run.matched) and run.status == status]

    def choose_rates(self, size: SizeSpec) -> None:
        """Adds the best rates of a size to those chosen, and gives up variants without one."""
        if not self.sweep:
            return
        own = [m for m in self.matched if m.size == size]
        swept = choose_rates(self.grid, own, self.sizes[0], self.sweep).get(size.name, {})
        before = self.content.get("learning_rates", {})
        self.note("learning_rates", before | {size.name: swept | before.get(size.name, {})})
        for run in self.runs:
            if run.matched.size == size and math.isnan(run.learning_rate) and run.status == "missing":
                run.fail("sweep", "no learning rate of its sweep gave a finished run", 1)

    def write_results(self) -> dict[str, Any]:
        """Joins what there is, writes results.json and returns it."""
        content = self.content
        joined = {
            "kind": KIND,
            "format": FORMAT,
            "command": content["starts"][-1]["command"],
            "environment": content["starts"][-1],
            "starts": content["starts"],
            "grid": _as_json(self.grid),
            "matching": {"by": self.grid.match, "tolerance": TOLERANCE, "reference": content["reference"]},
            "data": content["data"],
            "compute": content["compute"],
            "softmax_attention": content["softmax_attention"],
            "step_seconds": content.get("step_seconds", {}),
            "micro_batch_tokens": self.grid.recipe.batch.micro_size * self.grid.data.seq_len,
            "variants": [self._variant(m) for m in self.matched],
            "designs": [
                {"name": design.name, "fixed": design.fixed, "makes_up": design.makes_up}
                | {"variants": [variant.name for variant in design.variants]}
                for design in self.grid.designs
            ],
            "sweep": [run.outcome() for run in self.sweep],
            "runs": [run.outcome() for run in self.runs],
        }
        write_json(self.path / RESULTS, joined)
        return joined

    def _variant(self, matched: Matched) -> dict[str, Any]:
        return {
            "name": matched.name,
            "size": matched.size.name,
            "attention": matched.variant.attention,
            "ratio": matched.variant.head_ratio,
            "activation": matched.variant.activation,
            "model": matched.model,
            "parameters": matched.costs["parameters"],
            "embedding_parameters": matched.embedding_parameters,
            "training_flops_per_token": matched.costs["flops"],
            "kv_bytes_per_token": matched.costs["kv_cache"],
            "deviation": matched.deviations[self.grid.match],
            "deviations": matched.deviations,
            **(self._rate(matched) or {"learning_rate": None, "learning_rate_from": None}),
        }


def _decided(results: Mapping[str, Any]) -> dict[str, Any]:
    """A study.json from results.json; rates are chosen again, from the same sweep."""
    return {name: results[name] for name in _DECIDED} | {"reference": results["matching"]["reference"]}


def _as_json(grid: Grid) -> dict[str, Any]:
    """As JSON has it: tuples are lists there."""
    return json.loads(json.dumps(dataclasses.asdict(grid)))  # type: ignore[no-any-return]


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted name, before, after) of each value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            yield from _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (was, now) in enumerate(zip(before, after, strict=True)):
            yield from _differences(was, now, f"{prefix}[{i}]")
    elif before != after:
        yield prefix, before, after
