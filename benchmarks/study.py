"""The head-ratio study as a part of gpu.sh: some minutes at a time, on text of the machine.

    python -m benchmarks.study --output OUT/study.json --limit 450    # again, it goes on
    python -m benchmarks.study --quick                                # a smoke test

The grid is recipes/study/gpu_short.yaml. Its text is the Python sources on the machine: the
standard library's and the installed packages', prepared once. Runs are kept in runs/. The report of
what there is lies beside the JSON file.

Preparing text needs the package datasets. Where it is missing this says so and does nothing; a
folder that has it on PYTHONPATH is enough.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
import time
from pathlib import Path

from benchmarks.lib import cli, process, report

# Relative to the repository, in which the commands run: a record of them then says nothing of the
# machine's folders.
GRID = Path("recipes/study/gpu_short.yaml")
NEEDED = ("datasets", "multiprocess", "pydantic")
# A study that was asked to stop waits up to two minutes for its runs to save, and reports.
_PATIENCE = 130
_TINY = (
    "{name: tiny, hidden_size: 64, num_hidden_layers: 2, head_dim: 16, num_noise_heads: 1, "
    "intermediate_size: 288, intermediate_multiple: 1}"
)
_QUICK = {
    "sizes": f"[{_TINY}]",
    "variants": "[{attention: softmax_gqa}, {attention: gda, ratio: 2}, {attention: gda, ratio: 4}]",
    "seeds": "[0, 1]",
    "tokens": "4096",
    "data.seq_len": "64",
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


def prepare(folder: Path, *, quick: bool) -> list[str]:
    """The command that prepares the text in a folder."""
    packages = Path(sysconfig.get_paths()["purelib"])
    sources = ["stdlib"] if quick else ["stdlib", f"files:{packages}/**/*.py"]
    # Of each source, enough for several times the grid's tokens.
    seq_len, vocab_size, documents = (64, 512, 40) if quick else (1024, 8192, 30_000)
    numbers = {"seq-len": seq_len, "vocab-size": vocab_size, "max-documents": documents}
    argv = [word for source in sources for word in ("--source", source)]
    argv += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "motifarch.data.prepare", *argv, "--output", str(folder)]


def study(data: Path, output: Path, *, quick: bool) -> list[str]:
    """The command that runs the study on that text, or goes on with it."""
    # The text is prepared: a source in the record would be the grid's own, which this is not.
    argv = [str(GRID), "--output", str(output), "--data.path", str(data), "--data.source", "[]"]
    argv += [word for name, value in _QUICK.items() for word in (f"--{name}", value)] if quick else []
    return [sys.executable, "-m", "motifarch.cli", "benchmark", "head-ratio", *argv]


def keep(folder: Path, output: Path) -> bool:
    """Copy what a study has joined beside the JSON file; whether there was anything."""
    output.parent.mkdir(parents=True, exist_ok=True)
    found = [name for name in ("results.json", "report.html", "report.md") if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, output.with_suffix(Path(name).suffix))
    return bool(found)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.parser("benchmarks.study", __doc__)
    parser.add_argument("--limit", type=float, default=450, help="seconds, and on next time; default %(default)s")
    options = parser.parse_args(argv)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"skipped: {', '.join(missing)} cannot be imported here; a folder that has them on PYTHONPATH is enough")
        return 0
    deadline = time.monotonic() + options.limit
    name = "study_quick" if options.quick else "study_gpu"
    runs, data = Path("runs", name), Path("data", name)
    output: Path = (options.output or report.ROOT / runs.with_suffix(".json")).absolute()
    status: int | None
    try:
        with cli.terminate_as_interrupt():
            status = process.finish(prepare(data, quick=options.quick), deadline=deadline)
            if status == 0:
                command = study(data, runs, quick=options.quick)
                status = process.finish(command, deadline=deadline, patience=_PATIENCE)
    except KeyboardInterrupt:
        status = 143
    if status is None:
        print(f"stopped after {options.limit:.0f} s; the same command goes on")
    if keep(report.ROOT / runs, output):
        print(f"figures: {output}, and the report beside it")
    # One that has used its time up has done its part.
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
