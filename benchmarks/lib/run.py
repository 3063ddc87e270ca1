"""A kernel benchmark from its command line to its files: cases, tables, aims and the plot."""

import argparse
import contextlib
import itertools
import textwrap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch._functorch import config as functorch

from benchmarks.lib import cli, report
from benchmarks.lib.bench import DTYPES, clock_for, is_out_of_memory, measure_roofline, reason_of, release_memory
from benchmarks.lib.measure import Row, measure, seconds_of
from benchmarks.lib.providers import Provider
from benchmarks.lib.shapes import DIRECTIONS, LAYOUTS, Case
from motifarch.errors import UserError

MEBIBYTE = 1 << 20
_FLASH_ATTN = ("flash-attn", "flash-attn-3", "flash-attn-4")
PACKAGES = ("motifarch", "torch", "triton", "liger-kernel", "nvidia-cudnn-cu12", *_FLASH_ATTN)


@dataclass(frozen=True)
class Aim:
    """What ours is meant to reach, at every size it speaks of."""

    text: str
    measure: str
    """"copy_share", "speed" (how many times faster than the best baseline) or "peak_bytes" (the
    share of the least baseline's).
    """
    bound: float
    ours: Sequence[str]
    baselines: Sequence[str] = ()
    directions: Sequence[str] = ("both",)
    applies: Callable[[Mapping[str, Any]], bool] = lambda result: True
    """Whether it speaks of a result of ours."""
    dtype: str = "bf16"

    def ratio(self, ours: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]], direction: str) -> float | None:
        """The measured figure; None where what it takes was not measured."""
        if self.measure == "copy_share":
            return ours["copy_share"].get(direction)  # type: ignore[no-any-return]
        if self.measure == "peak_bytes":
            return float(ours["peak_bytes"] / min(b["peak_bytes"] for b in baselines)) if baselines else None
        times = [b["seconds"][direction]["median"] for b in baselines if direction in b["seconds"]]
        return float(min(times) / ours["seconds"][direction]["median"]) if times else None

    def met(self, ratio: float) -> bool:
        """Whether a figure is good enough."""
        return ratio <= self.bound if self.measure == "peak_bytes" else ratio >= self.bound


def _number(value: float) -> str:
    return f"{value:,.{1 if value >= 10 else 3}f}"


class KernelBenchmark(ABC):
    """A benchmark of kernels: a subclass says what is its own."""

    name: str
    """As in ``python -m benchmarks.ops.NAME``."""
    doc: str | None
    """Of its module."""
    labels: Mapping[str, str]
    """Providers, for people."""
    ours: Sequence[str]
    tolerances: Mapping[str, float]
    """Largest relative error of an element, by dtype."""
    group: Sequence[str]
    """The fields of a result that tell what a table is about."""
    size: str
    """The field that its lines differ in."""
    aims: Mapping[str, Sequence[Aim]]
    """By the type of the device."""
    matrix = False
    """Whether its work has matrix products, whose rate belongs to the roofline."""
    rate = "gb_per_second"
    """Shown in tables, or "tflops"."""
    numbers: Sequence[str] = ()
    """Its own options that must be above 0."""

    @abstractmethod
    def add_options(self, add: Callable[..., Any]) -> None:
        """Its own options, by a parser's ``add_argument``."""

    @abstractmethod
    def set_defaults(self, arguments: argparse.Namespace, *, cuda: bool, quick: bool) -> None:
        """Fill in what was not given, ``seconds`` included, and check."""

    @abstractmethod
    def cases(self, arguments: argparse.Namespace) -> Iterable[Case]:
        """What the command line asks for."""

    @abstractmethod
    def providers(self, case: Any, names: Sequence[str], device: torch.device) -> list[Provider]:
        """For a case, those of these names, each with every kernel that it could take."""

    @abstractmethod
    def describe_group(self, result: Mapping[str, Any]) -> str:
        """What a table is about, in words."""

    def left_out(self, device: torch.device) -> dict[str, str]:
        """The providers that cannot run on a device, with the reason."""
        return {}

    def unsupported(self, case: Any, name: str, arguments: argparse.Namespace) -> str | None:
        """Why a provider is not tried on a case, or None."""
        return None

    def extra(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Its own content of the JSON."""
        return {}

    def softmax_baselines(self, content: dict[str, Any]) -> list[str]:
        """Add each size's fastest softmax attention of all to the JSON; lines to print."""
        if "layout" not in self.group:
            return []
        directions = max((len(r["seconds"]) for r in content["results"]), default=0)
        cells: dict[tuple[Any, ...], Row] = {}
        for r in content["results"]:
            if not LAYOUTS[r["layout"]].noise_heads and len(r["seconds"]) == directions:
                key = tuple(r[name] for name in (*self.group, self.size))
                cells[key] = min(cells.get(key, r), r, key=seconds_of)
        names = (*self.group, self.size, "provider", "variant", "form", "seconds")
        content["softmax_baselines"] = [{name: r[name] for name in names} for r in cells.values()]
        return [
            f"softmax baseline at {self.describe_group(r)}, {self.size} {r[self.size]:,}: {self.label(r)}, "
            f"{seconds_of(r) * 1e3:,.3g} ms"
            for r in cells.values()
        ]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """The command line; returns the exit status."""
        parser = cli.parser(f"benchmarks.ops.{self.name}", self.doc)
        add, names = parser.add_argument, list(self.labels)
        add("--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, float32 and bf16 on a CPU")
        add("--providers", "--contenders", nargs="+", choices=names, help="default: all that can run here")
        add("--seconds", type=float, help="of measuring for each provider at each size")
        add("--limit", type=float, help="seconds after which no new size is begun")
        self.add_options(add)
        arguments = parser.parse_args(argv)
        return cli.exit_status(lambda: self.run(arguments, self.resolve(arguments)))

    def resolve(self, arguments: argparse.Namespace) -> torch.device:
        """Fill in the defaults that depend on the device, and check.

        Raises:
            UserError: an option has no meaning or cannot be had here.
        """
        device = cli.resolve_device(arguments, ("seconds", "limit", *self.numbers))
        cuda = device.type == "cuda"
        arguments.dtypes = arguments.dtypes or (["bf16"] if cuda else list(DTYPES))
        missing, named = self.left_out(device), arguments.providers
        for name in named or ():
            if name in missing:
                raise UserError(f"--providers {name}: {missing[name]}; leave it out")
        arguments.left_out = {} if named else missing
        arguments.providers = named or [name for name in self.labels if name not in missing]
        arguments.named = bool(named)
        self.set_defaults(arguments, cuda=cuda, quick=arguments.quick)
        return device

    def run(self, arguments: argparse.Namespace, device: torch.device) -> int:
        """Measure all cases and report; the JSON file is written anew after each.

        Returns:
            The exit status: 1 if a provider of ours failed anywhere, or if it was stopped before
            the end.
        """
        # Wide enough for the tables, which a narrow terminal would cut.
        console, begun = Console(width=max(Console().width, 120)), time.monotonic()
        env = cli.introduce(f"benchmarks.ops.{self.name}", device, PACKAGES, console)
        if device.type == "cuda":
            env["cudnn"] = torch.backends.cudnn.version()
        for name, reason in arguments.left_out.items():
            console.print(f"{self.labels[name]} is left out: {reason}", style="dim")
        path = cli.results_path(self.name, arguments, device)
        clock, quick = clock_for(device), arguments.quick
        dtypes = arguments.dtypes if self.matrix else ()
        roofline = measure_roofline(device, clock, dtypes, seconds=arguments.seconds, quick=quick)
        options = ("seconds", "limit", "threads", "device", "quick", *self.numbers)
        content: dict[str, Any] = {
            "benchmark": self.name,
            "format": 2,
            "complete": False,
            "environment": env,
            "settings": {name: getattr(arguments, name) for name in options},
            "providers": {name: self.labels[name] for name in arguments.providers},
            "left_out": arguments.left_out,
            **self.extra(arguments),
            **roofline.content(),
            "tolerances": self.tolerances,
            **{name: [] for name in ("results", "failed", "skipped", "not_begun", "aims")},
        }
        settings = {"seconds": arguments.seconds, "rounds": 1 if quick else 3}
        # Compiled functions are timed on the same saved tensors again and again.
        donated = functorch.patch(donated_buffer=False)
        with contextlib.suppress(KeyboardInterrupt), cli.terminate_as_interrupt(), donated:
            for case in self.cases(arguments):
                if arguments.limit is not None and time.monotonic() - begun > arguments.limit:
                    content["not_begun"].append(case.cell())
                    continue
                console.print(case.describe(), style="dim")
                reasons = {name: self.unsupported(case, name, arguments) for name in arguments.providers}
                names = [name for name, reason in reasons.items() if reason is None]
                torch.compiler.reset()  # else earlier shapes make it compile for shapes of any size
                try:
                    providers = self.providers(case, names, device)
                    given = case, providers, device, clock, roofline
                    results, failed = measure(*given, tolerance=self.tolerances[case.dtype], **settings)
                    content["results"] += results
                    content["failed"] += failed
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    reasons |= dict.fromkeys(names, reason_of(error))
                    release_memory()
                content["skipped"] += [case.cell() | {"provider": n, "reason": r} for n, r in reasons.items() if r]
                report.write_json(path, content)
            content["complete"] = True
        if not content["complete"]:
            console.print("stopped: the figures so far follow", style="yellow")
        lines = self.softmax_baselines(content)
        if not quick:
            content["aims"] = self.judge(content["results"], device)
        report.write_json(path, content)
        self.print_results(console, content)
        for line in lines:
            console.print(line, soft_wrap=True)
        console.print(f"figures: {path}", soft_wrap=True)
        if content["results"]:
            self.plot(path.with_suffix(".png"), content)
            console.print(f"plot: {path.with_suffix('.png')}", soft_wrap=True)
        return int(not content["complete"] or any(r["provider"] in self.ours for r in content["failed"]))

    def judge(self, results: Sequence[Row], device: torch.device) -> list[Row]:
        """Hold results to the aims of the device: for each group, aim and direction, the worst of
        its sizes.

        What was not measured is not judged.
        """
        fields = ("function", "layout", "dtype", "rows", "columns", "length", "batch", "context")
        cells: dict[tuple[Any, ...], list[Row]] = {}
        for r in results:
            cells.setdefault(tuple(r.get(name) for name in fields), []).append(r)
        found: dict[tuple[Any, ...], list[tuple[float, Row]]] = {}
        for aim, cell in itertools.product(self.aims.get(device.type, ()), cells.values()):
            baselines = [r for r in cell if r["provider"] in aim.baselines]
            for r in cell:
                if r["provider"] in aim.ours and r["dtype"] == aim.dtype and aim.applies(r):
                    where = tuple((name, r[name]) for name in ("function", "layout", "dtype") if name in r)
                    for d in aim.directions:
                        if (ratio := aim.ratio(r, baselines, d)) is not None:
                            found.setdefault((aim, where, r["provider"], d), []).append((ratio, r))
        judged = []
        for (aim, where, provider, direction), ratios in found.items():
            ratio, at = (max if aim.measure == "peak_bytes" else min)(ratios, key=lambda pair: pair[0])
            names = {**dict(where), "provider": provider, "aim": aim.text, "direction": direction}
            worst = {"worst": ratio, "worst_at": {name: at[name] for name in fields[3:] if name in at}}
            judged.append(names | worst | {"bound": aim.bound, "sizes": len(ratios), "met": aim.met(ratio)})
        return judged

    # --- Report -----------------------------------------------------------------------------------

    def groups(self, results: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
        """Each provider's best results: what a table is about -> size, in order -> results."""
        groups: dict[str, dict[int, list[Row]]] = {}
        for r in sorted(results, key=lambda r: (list(map(str, (r.get(n) for n in self.group))), r[self.size])):
            if r.get("best", True):
                groups.setdefault(self.describe_group(r), {}).setdefault(r[self.size], []).append(r)
        return groups

    def label(self, result: Mapping[str, Any]) -> str:
        """Provider, kernel and what was done to its inputs."""
        details = ", ".join(filter(None, (result.get("variant"), result.get("form"))))
        return self.labels[result["provider"]] + (f" ({details})" if details else "")

    def print_results(self, console: Console, content: Mapping[str, Any]) -> None:
        """A table for each group; what failed or was not begun; the aims."""
        unit, scale = ("µs", 1e6) if content["environment"]["device"] != "cpu" else ("ms", 1e3)
        console.print(f"copy bandwidth: {content['copy']['gb_per_second']:,.1f} GB/s, read and written")
        if matrix := content.get("matrix"):
            done = ", ".join(f"{name} {value:,.3g}" for name, value in matrix["tflops"].items())
            console.print(f"matrix products of {matrix['size']:,}: {done} TFLOP/s")
        for title, sizes in self.groups(content["results"]).items():
            directions = [d for d in DIRECTIONS if any(d in r["seconds"] for cell in sizes.values() for r in cell)]
            rows = []
            for size, cell in sizes.items():
                for i, r in enumerate(cell):
                    texts = [f"{size:,}" if i == 0 else "", self.label(r)]
                    for d in directions:
                        if d not in r["seconds"]:
                            texts += ["-", ""]
                            continue
                        spread = r["seconds"][d]
                        time_ = f"{_number(scale * spread['median'])} ±{report.half_spread(spread):.0f}%"
                        texts += [time_, f"{100 * r['share_of_roofline'][d]:.0f}%"]
                    rate = r[self.rate].get(directions[-1])
                    peak = None if r["peak_bytes"] is None else r["peak_bytes"] / MEBIBYTE
                    host = [scale * s for d, s in r.get("host_seconds", {}).items() if d == directions[-1]] or [None]
                    figures = ("-" if n is None else _number(n) for n in (rate, peak, *host))
                    rows.append((*texts, *figures))
                bounds = max((r["roofline_seconds"] for r in cell), key=len)
                by = sorted({"bytes" if b["bound"] == b["bytes"] else "FLOPs" for b in bounds.values()})
                times = [text for d in directions for text in (_number(scale * bounds[d]["bound"]), "")]
                rows.append(("", f"roofline, by {' or '.join(by)}", *times, "", "", ""))
            short = {"forward": "fwd", "backward": "bwd", "both": "both"}
            headings = [text for d in directions for text in (f"{short[d]}\n{unit}", "of\nroof")]
            headings += [f"{'TFLOP/s' if self.rate == 'tflops' else 'GB/s'}\n{short[directions[-1]]}"]
            headings += ["peak\nMiB", f"host\n{unit}"]
            console.print(report.table(title, [self.size, "", *headings], rows, text_columns=2))
        for r in content["failed"]:
            where = f"{self.describe_group(r)}, {self.size} {r[self.size]:,}"
            console.print(f"[red]failed[/red] {self.label(r)} at {where}: {r['reason']}", soft_wrap=True)
        if content["not_begun"]:
            names = "; ".join(f"{self.describe_group(r)}, {r[self.size]:,}" for r in content["not_begun"])
            console.print(f"[yellow]not begun, for the time was over[/yellow]: {names}", soft_wrap=True)
        for aim in content["aims"]:
            verdict = "[green]met[/green]    " if aim["met"] else "[red]not met[/red]"
            what = aim.get("function") or LAYOUTS[aim["layout"]].describe()
            where = f"{what}, {aim['dtype']}, {self.labels[aim['provider']]}"
            at = ", ".join(f"{name} {value:,}" for name, value in aim["worst_at"].items())
            text = f"{where}, {aim['direction']}: {aim['aim']}: [bold]{aim['worst']:.2f}[/bold] at worst ({at})"
            console.print(f"{verdict}  {text}", soft_wrap=True)
        if not content["aims"]:
            console.print("No aim was judged: that takes a full run, and for most of them a GPU.")

    def plot(self, path: Path, content: Mapping[str, Any]) -> None:
        """Each group's share of the roofline, forward and backward together where both are."""
        groups = self.groups(content["results"])
        there = {r["provider"] for r in content["results"]}
        labels = [label for name, label in self.labels.items() if name in there]
        colours = dict(zip(labels, (*report.COLOURS, report.GREY), strict=False))
        figure, axes = report.figure(len(groups), 1, size=(9, 1.4 + 2.4 * len(groups)))
        for (title, sizes), (axis,) in zip(groups.items(), axes, strict=True):
            shares: dict[str, list[float]] = {}
            for name in dict.fromkeys(r["provider"] for cell in sizes.values() for r in cell):
                label = self.labels[name]
                for cell in sizes.values():
                    share: Mapping[str, float] = next(
                        (r["share_of_roofline"] for r in cell if r["provider"] == name), {}
                    )
                    shares.setdefault(label, []).append(100 * share.get("both", share.get("forward", 0.0)))
            report.grouped_bars(axis, [f"{size:,}" for size in sizes], shares, colours=colours)
            axis.set_title(f"{title}: % of roofline", fontsize=9)
        handles, texts = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), frameon=False)
        machine = textwrap.fill(report.describe(content["environment"]), 90)
        figure.suptitle(f"{self.name}, by {self.size}\n{machine}", fontsize=11)
        report.write_plot(path, figure)
