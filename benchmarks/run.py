"""The benchmarks that this machine can run, one after another, joined in one report.

    python -m benchmarks.run --output DIR
    python -m benchmarks.run --output DIR --quick --only poly_norm train_step

Each is a process of its own, which knows what sizes suit a CPU and what a GPU. Figures and plots
are joined in DIR/all.json, report.html and report.md. What has finished in DIR is kept: the same
command goes on after a stop, and tries again what failed.
"""

import argparse
import base64
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from rich.console import Console

from benchmarks.compare import compare, read_results, show, summary
from benchmarks.lib import cli, report
from benchmarks.lib.figures import Table, tables
from motifarch.errors import UserError

PACKAGES = ("motifarch", "torch", "triton", "transformers", "flash-attn", "flash-attn-4", "liger-kernel")
STUDIES = ("recipes/study/tiny_cpu.yaml", "recipes/study/gpu_short.yaml")  # on a CPU, on a GPU


class Part(NamedTuple):
    """A benchmark."""

    title: str
    module: str
    minutes: tuple[float, float]
    """What it takes about, on a CPU and on a GPU."""


PARTS = {
    "attention": Part("Attention", "benchmarks.ops.attention", (4, 4)),
    "poly_norm": Part("PolyNorm", "benchmarks.ops.poly_norm", (5, 2)),
    "grouped_poly_norm": Part("PolyNorm of experts", "benchmarks.ops.grouped_poly_norm", (4, 2)),
    "hyper_connections": Part("Hyper-connections", "benchmarks.ops.hyper_connections", (4, 2)),
    "combine": Part("The epilogue of differential attention", "benchmarks.ops.combine", (5, 2)),
    "routing": Part("Routing to experts", "benchmarks.ops.routing", (3, 2)),
    "decode": Part("The decoding kernel", "benchmarks.ops.decode", (4, 2)),
    "train_step": Part("A training step", "benchmarks.models.train_step", (12, 4)),
    "generate": Part("generate", "benchmarks.models.generate", (12, 6)),
    "study": Part("The head-ratio study", "motifarch.cli", (90, 20)),
}


class Run:
    """All parts, and the file that joins them."""

    def __init__(self, options: argparse.Namespace, console: Console):
        self.options, self.console, self.output = options, console, options.output.resolve()
        self.cuda = torch.cuda.is_available()
        earlier = read_results(self.output / "all.json") if (self.output / "all.json").is_file() else {"parts": ()}
        self.parts: dict[str, dict[str, Any]] = {part["name"]: part for part in earlier["parts"]}
        env = report.environment("benchmarks.run", torch.device("cuda" if self.cuda else "cpu"), PACKAGES)
        self.content: dict[str, Any] = {"kind": "all_benchmarks", "format": 1, "command": env["command"]}
        self.content["environment"] = env

    def run(self) -> int:
        """Run what is asked for; the exit status."""
        old = read_results(self.options.compare) if self.options.compare else None
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        chosen = self.options.only or list(PARTS)
        try:
            with cli.terminate_as_interrupt():
                for i, name in enumerate(chosen):
                    minutes = sum(PARTS[left].minutes[self.cuda] for left in chosen[i:])
                    self.parts[name] = self.measure(name, "" if self.options.quick else f", about {minutes:g} min left")
                    self.save()
        except KeyboardInterrupt:
            self.console.print("stopped; the same command keeps what has finished and goes on")
            return 130
        if old is not None:
            self.content["comparison"] = compare(old, self.content)
            show(self.content["comparison"], self.console)
            self.save()
        write_report(self.content, self.output)
        self.console.print(f"written: {self.output / 'all.json'}, report.html, report.md", soft_wrap=True)
        return int(any(self.parts[name]["status"] == "failed" for name in chosen))

    def save(self) -> None:
        """Write what there is, with the parts that this run was not asked for."""
        self.content["parts"] = [self.parts[name] for name in PARTS if name in self.parts]
        report.write_json(self.output / "all.json", self.content)

    def measure(self, name: str, left: str) -> dict[str, Any]:
        """Run a part, or say why not; what came of it."""
        title, quick = PARTS[name].title, ["--quick"] if self.options.quick else []
        entry: dict[str, Any] = {"name": name, "title": title, "reason": None, "plots": []}
        result = self.output / ("study/results.json" if name == "study" else f"{name}.json")
        words = ["--output", str(result), *quick]
        if name == "study":
            if quick and not self.options.study:
                reason = "a study takes hours, and this is --quick; give a small one as --study STUDY.yaml"
                self.console.print(f"{title}: skipped: {reason}")
                return {**entry, "status": "not_run", "reason": reason}
            grid = self.options.study or report.ROOT / STUDIES[self.cuda]
            words = ["benchmark", "head-ratio", str(grid.resolve()), "--output", str(result.parent)]
        command = [sys.executable, "-m", PARTS[name].module, *words]
        before = self.parts.get(name, {"status": "none"})
        if before["status"] == "finished" and before["command"] == shlex.join(command) and not self.options.again:
            self.console.print(f"{title}: kept from {before['content']['environment']['date']}")
            return before
        # What lies there is of another run: a part that fails must not be reported with it.
        for path in () if name == "study" else (result, *self.output.glob(f"{name}*.png")):
            path.unlink(missing_ok=True)
        log, began = self.output / "logs" / f"{name}.log", time.monotonic()
        self.console.print(f"{title}: begun{left}; {log} has what it prints", soft_wrap=True)
        status = execute(command, log)
        entry |= {"command": shlex.join(command), "log": f"logs/{name}.log"}
        entry |= {"seconds": round(time.monotonic() - began, 1), "status": "failed"}
        content = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
        if content is None:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
            entry["reason"] = f"exit status {status}, no figures; the last line it printed: {last}"
        elif content.get("complete") is False:
            entry["reason"] = f"exit status {status}, before it had measured everything"
        else:  # figures that are whole count, whatever it complains about
            entry |= {"status": "finished", "content": content}
            entry["plots"] = sorted(path.name for path in self.output.glob(f"{name}*.png"))
            if status:
                entry["reason"] = f"exit status {status}: its log says what went wrong beside the figures"
        reason = f": {entry['reason']}" if entry["reason"] else ""
        self.console.print(f"{title}: {entry['status']} after {entry['seconds']:.0f} s{reason}", soft_wrap=True)
        return entry


def execute(command: Sequence[str], log: Path) -> int:
    """Run a command in the repository, which ends with this process; its exit status."""
    search = os.pathsep.join(filter(None, [str(report.ROOT), str(report.ROOT / "kernels"), os.getenv("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, cwd=report.ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()  # it writes what it has
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def write_report(content: Mapping[str, Any], folder: Path) -> None:
    """Write report.html and report.md from what all.json holds; plots lie in the same folder."""
    rows = [
        [p["title"], p["status"].replace("_", " "), f"{p.get('seconds', 0) / 60:.1f} min", p["reason"] or ""]
        for p in content["parts"]
    ]
    overview = Table("What ran", ("Benchmark", "Outcome", "Took", "Reason"), rows)
    sections: list[dict[str, Any]] = [{"title": "What ran", "tables": [overview], "command": content["command"]}]
    if comparison := content.get("comparison"):
        lines, table = summary(comparison)
        sections.append({"title": "What moved", "lines": lines, "tables": [table]})
    for part in (part for part in content["parts"] if "content" in part):
        found = part["content"]
        quick = (found.get("settings") or {}).get("quick")
        lines = ["Tiny sizes (--quick): this proves that it runs, and measures nothing."] if quick else []
        lines += [f"Skipped: {name}: {reason}." for name, reason in (found.get("left_out") or {}).items()]
        if part["name"] == "study":
            lines.append("Its own report is study/report.html.")
        plots = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in part["plots"]}
        made = {"title": part["title"], "lines": lines, "tables": tables(found), "plots": plots}
        sections.append({**made, "command": found["environment"]["command"]})
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "lib"),
        autoescape=lambda name: name == "report.html.j2",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    machine = report.describe(content["environment"])
    for name in ("report.html", "report.md"):
        text = templates.get_template(f"{name}.j2").render(sections=sections, machine=machine)
        (folder / name).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.bare_parser("benchmarks.run", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="everything is written there")
    add("--only", nargs="+", choices=list(PARTS), metavar="NAME", help=f"of {', '.join(PARTS)}")
    add("--study", type=Path, metavar="STUDY.yaml", help=f"default: {STUDIES[0]}, on a GPU {STUDIES[1]}")
    add("--quick", action="store_true", help="tiny sizes, which prove that all of it runs; a study only with --study")
    add("--again", action="store_true", help="measure anew what has finished in DIR")
    add("--compare", type=Path, metavar="OLD.json", help="show what moved since: an all.json or results.json")
    options = parser.parse_args(argv)

    def run() -> int:
        if options.study and not options.study.is_file():
            raise UserError(f"--study {options.study} is no file; give a study's YAML, such as {STUDIES[0]}")
        return Run(options, Console(highlight=False)).run()

    return cli.exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
