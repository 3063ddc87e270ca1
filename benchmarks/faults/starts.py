"""A tiny run and its starts: torchrun's own, and quick ones from a server that has imported all."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RANKS = 2
_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_noise_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
# What a row of metrics holds beside what training computes.
_MEASURED = ("tokens_per_second", "model_tflops", "memory_gib")
_server = multiprocessing.get_context("forkserver")


def prepare_inputs(folder: Path, *, steps: int, every: int) -> Path:
    """Writes data and a recipe for a run of some steps, saved at every so many and validated at
    every second save; the recipe's path.
    """
    draw = random.Random(0)
    source = folder / "source"
    source.mkdir(parents=True)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "(", ")", "=", "\n"]
    for number in range(30):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(20, 300)))
        (source / f"{number}.txt").write_text(f"{number} {text}\n")
    options = {"source": f"files:{source}/*.txt", "output": folder / "data", "vocab-size": 300, "seq-len": 32}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = ["-m", "motifarch.cli", "data", "prepare", *arguments, "--validation-fraction", "0.2", "--num-proc", "1"]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    recipe = {
        "model": _MODEL,
        "run": {"steps": steps, "output": str(folder / "run")},
        "data": {"datasets": [{"path": str(folder / "data")}]},
        "batch": {"size": 8, "micro_size": 4},
        "optim": {"lr": 3e-3, "schedule": "constant", "warmup_steps": 2, "z_loss": 1e-4},
        "precision": {"compute": "float32"},
        "checkpoint": {"every": every},
        "validation": {"every": 2 * every, "sequences": 8},
        "log": {"every": 1, "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass(frozen=True)
class Start:
    """A process that was started, and where it prints."""

    pid: int
    poll: Callable[[], int | None]
    log: Path

    def processes(self) -> list[int]:
        """The process and all below it."""
        return [self.pid, *_descendants(self.pid)]

    def wait(self, limit_s: float) -> int | None:
        """The exit status, or None where it takes longer."""
        until = time.monotonic() + limit_s
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.poll()


def torchrun(arguments: Sequence[str], log: Path) -> Start:
    """Starts training on two ranks by torchrun's command line."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "motifarch.train"]
    with log.open("ab") as file:
        process = subprocess.Popen([sys.executable, *command, *arguments], stdout=file, stderr=file)
    return Start(process.pid, process.poll, log)


def quick_torchrun(arguments: Sequence[str], log: Path) -> Start:
    """The same by torchrun's agent, forked as its ranks are."""
    return _forked(_launch, arguments, log)


def quick_train(arguments: Sequence[str], log: Path) -> Start:
    """Starts any command of motifarch in one process that is forked so."""
    return _forked(_command, arguments, log)


def _forked(function: Callable[..., Any], arguments: Sequence[str], log: Path) -> Start:
    _server.set_forkserver_preload(["benchmarks.faults.preload"])
    process = _server.Process(target=_into_log, args=(function, list(arguments), log))
    process.start()
    assert process.pid is not None
    return Start(process.pid, lambda: process.exitcode, log)


def _into_log(function: Callable[..., Any], arguments: list[str], log: Path) -> None:
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    function(arguments)


def _launch(arguments: list[str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, RANKS, run_id=uuid.uuid4().hex, rdzv_backend="c10d", start_method="fork")
    config.rdzv_endpoint, config.max_restarts = "localhost:0", 0
    elastic_launch(config, _rank)(["train", *arguments])


def _rank(arguments: list[str]) -> None:
    # torchrun's own ranks do not have the agent's handlers.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _command(arguments)
    except SystemExit as ended:
        if ended.code:
            os._exit(ended.code if isinstance(ended.code, int) else 1)


def _command(arguments: list[str]) -> None:
    from motifarch.cli import main

    main(arguments)


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children + [below for child in children for below in _descendants(child)]


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the processes that still run."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def kill(pids: Sequence[int]) -> None:
    """SIGKILL for each that is there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def computed_rows(output: Path) -> list[dict[str, Any]]:
    """A run's whole rows of metrics, without what was measured of the machine."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (output / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(row := json.loads(line), dict):
                    rows.append({name: value for name, value in row.items() if name not in _MEASURED})
    return rows
