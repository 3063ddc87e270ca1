"""The head-ratio study as a part of benchmarks/gpu.sh: some minutes at a time, on text that lies on
the machine.

    python -m benchmarks.study --output OUT/study.json --limit 450     # on a GPU; the same command goes on
    python -m benchmarks.study --quick                                 # a smoke test on tiny models, with no meaning

The grid is recipes/study/gpu_short.yaml. Its text is the Python sources on the machine: the
standard library's and the installed packages', prepared once. Runs are kept in runs/, so that each
start goes on where the one before stopped. The report of what there is lies beside the JSON file as
HTML and Markdown.

Preparing text and reading a grid take the packages datasets and jsonargparse, which motifarch
depends on. On a machine that lacks them and reaches no network, put a folder with them on
PYTHONPATH; without, this says so and does nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels import terminate_as_interrupt
from benchmarks.lib import report

# Relative to the repository, in which the commands run: a record of them then says nothing of the
# machine's folders.
GRID = Path("recipes/study/gpu_short.yaml")
NEEDED = ("datasets", "multiprocess", "jsonargparse")
# Of each source: enough for several times the grid's tokens, and prepared in a minute or two.
_DOCUMENTS = 30_000
# A study that was asked to stop waits up to two minutes for its runs to save, and reports.
_PATIENCE_S = 130

_TINY = (
    "{name: tiny, hidden_size: 64, num_hidden_layers: 2, head_dim: 16, num_noise_heads: 1, "
    "intermediate_size: 288, intermediate_multiple: 1}"
)
_QUICK = {
    "sizes": f"[{_TINY}]",
    "variants": "[{attention: softmax_gqa}, {attention: gda, ratio: 2}, {attention: gda, ratio: 4}]",
    "seeds": "[0, 1]",
    "tokens": "4096",
    "recipe.batch.size": "8",
    "recipe.batch.micro_size": "8",
    "recipe.optim.warmup_steps": "2",
    "recipe.optim.decay_steps": "2",
    "recipe.validation.every": "4",
    "recipe.validation.sequences": "4",
    "recipe.log.every": "1",
    "measure.samples": "4",
    "measure.attention_rows": "1",
    "measure.new_tokens": "2",
    "measure.repeats": "1",
}


def missing_packages() -> list[str]:
    """Packages that a study needs and this interpreter lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def prepare(folder: Path, *, quick: bool) -> list[str]:
    """The command that prepares the text in a folder."""
    packages = Path(sysconfig.get_paths()["purelib"])
    sources = ["stdlib"] if quick else ["stdlib", f"files:{packages}/**/*.py"]
    seq_len, vocab_size, documents = (64, 512, 40) if quick else (1024, 8192, _DOCUMENTS)
    numbers = {"seq-len": seq_len, "vocab-size": vocab_size, "max-documents": documents}
    argv = [word for source in sources for word in ("--source", source)]
    argv += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "motifarch.data.prepare", *argv, "--output", str(folder)]


def study(data: Path, output: Path, *, quick: bool) -> list[str]:
    """The command that runs the study on that text, or goes on with it."""
    # The text is prepared: a source in the record would be the grid's own, which this is not.
    argv = [str(GRID), "--output", str(output), "--data.path", str(data), "--data.source", "[]"]
    if quick:
        argv += ["--data.seq_len", "64", *(word for name, value in _QUICK.items() for word in (f"--{name}", value))]
    return [sys.executable, "-m", "motifarch.cli", "benchmark", "head-ratio", *argv]


def finish(command: Sequence[str], deadline: float) -> int | None:
    """Runs a command up to a moment of time.monotonic(); its exit status, None if it had to be
    stopped.
    """
    process = subprocess.Popen(command, cwd=report.ROOT)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()  # its runs are tied to it, and save
                process.wait()


def keep(folder: Path, output: Path) -> bool:
    """Copies what a study has joined beside the JSON file; whether there was anything."""
    found = False
    for name, suffix in (("results.json", ".json"), ("report.html", ".html"), ("report.md", ".md")):
        if (folder / name).is_file():
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, output.with_suffix(suffix))
            found = True
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    summary, *_ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=summary)
    add = parser.add_argument
    add("--output", type=Path, help="JSON file; default runs/study_gpu.json")
    add("--limit", type=float, default=450, metavar="SECONDS", help="stop then, and go on next time; default 450")
    add("--quick", action="store_true", help="tiny models, a smoke test")
    options = parser.parse_args(argv)
    if missing := missing_packages():
        print(f"not run: {', '.join(missing)} cannot be imported here; a folder that has them on PYTHONPATH is enough")
        return 0
    deadline = time.monotonic() + options.limit
    name = "study_quick" if options.quick else "study_gpu"
    runs, data = Path("runs", name), Path("data", name)
    output = (options.output or report.ROOT / runs.with_suffix(".json")).absolute()
    try:
        with terminate_as_interrupt():
            status = finish(prepare(data, quick=options.quick), deadline)
            if status == 0:
                status = finish(study(data, runs, quick=options.quick), deadline)
    except KeyboardInterrupt:
        status = 128 + signal.SIGTERM
    if status is None:
        print(f"stopped after {options.limit:.0f} s; the same command goes on")
    if keep(report.ROOT / runs, output):
        print(f"figures: {output}, and the report beside it")
    # One that has used its time up has done its part.
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
