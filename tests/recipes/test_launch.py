"""The launch scripts, run on one machine; SLURM's with stand-ins."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.distributed import TIMEOUT, wait_until
from helpers.tiny import write_recipe
from motifarch.train.manifest import find_newest
from motifarch.train.run_folder import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
SCRIPTS = sorted((ROOT / "recipes").rglob("*.sh"))

# srun: leaves its own options out and runs the rest, as on a job of one node.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) [[ "$2 $3" == "hostnames nodes[1-2]" ]] && printf 'localhost\\nnode2\\n' ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "GPUS": "2"} | variables


def run(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=environment(**variables), check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).stderr == b""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    checked = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_torchrun_says_what_it_would_run() -> None:
    command = run("torchrun.sh", "r.yaml", "--run.steps", 3, NODES="4", HEAD="node-a", DRY_RUN="1").stdout
    for words in (
        "--nnodes 4",
        "--nproc-per-node 2",
        "--max-restarts 3",
        "--rdzv-backend c10d",
        "--rdzv-endpoint node-a:29500",
        "-m motifarch.train r.yaml --run.steps 3",
    ):
        assert words in command
    assert "node-a:1234 " in run("torchrun.sh", "r.yaml", NODES="2", HEAD="node-a:1234", DRY_RUN="1").stdout


@pytest.mark.parametrize(("script", "arguments"), [("torchrun.sh", ()), ("torchrun.sh", ("-h",)), ("slurm.sh", ())])
def test_scripts_explain_themselves(script: str, arguments: tuple[str, ...]) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2
    assert "recipes/motif_2.6b/b200_64.yaml" in done.stderr or "sbatch --nodes N" in done.stderr


def test_several_machines_need_a_place_to_meet() -> None:
    done = run("torchrun.sh", "r.yaml", NODES="2")
    assert done.returncode == 2
    assert "HEAD must name the machine" in done.stderr


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on a cluster of stand-ins."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    variables = environment(
        SLURM_JOB_ID="4242",
        SLURM_JOB_NODELIST="nodes[1-2]",
        SLURM_JOB_NUM_NODES="1",
        REQUEUED=str(tmp_path / "requeued"),
        PORT="0",
    )
    return variables | {"PATH": f"{stand_ins}:{variables['PATH']}"}


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_that_ends_by_itself_is_not_queued_again(tmp_path: Path, slurm: dict[str, str], status: int) -> None:
    said = tmp_path / "said"
    (tmp_path / "bin" / "srun").write_text(f'#!/usr/bin/env bash\necho "$@" > {said}\nexit {status}\n')
    command = [str(LAUNCH / "slurm.sh"), "r.yaml", "--run.steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=slurm | {"SLURM_RESTART_COUNT": "2"}, check=False)
    assert done.returncode == status
    assert not (tmp_path / "requeued").exists()
    for words in (
        "--output=logs/%j-2-%N.out",
        "torchrun --nnodes 1 --nproc-per-node 2",
        "--rdzv-id 4242-2 ",
        "--rdzv-endpoint localhost:0 ",
        "-m motifarch.train r.yaml --run.steps 3",
    ):
        assert words in said.read_text()


@pytest.mark.slow
def test_slurm_saves_and_requeues_and_torchrun_resumes(tmp_path: Path, data: Path, slurm: dict[str, str]) -> None:
    recipe = write_recipe(tmp_path, data)
    output = tmp_path / "run"

    def rows() -> int:
        return len(read_metrics(output / "metrics.jsonl"))

    # Far more steps than can be done before the signal, and no checkpoint due on the way.
    rare = ("--checkpoint.every", "100000", "--validation.every", "0")
    long = [str(LAUNCH / "slurm.sh"), str(recipe), *rare, "--run.steps", "100000"]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(long, cwd=tmp_path, env=slurm, stdout=file, stderr=file) as process:
        try:
            wait_until(lambda: rows() >= 5, process)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(timeout=TIMEOUT) == 0
        finally:
            if process.poll() is None:
                process.terminate()
    assert (tmp_path / "requeued").read_text() == "4242\n"
    stopped = rows()
    assert f"stopped after step {stopped}" in log.read_text()
    newest = find_newest(output)
    assert newest is not None
    assert newest.name == f"step_{stopped:08d}"

    done = run("torchrun.sh", recipe, *rare, "--run.steps", stopped + 3)
    assert done.returncode == 0, done.stderr
    assert f"2 ranks on cpu, float32, resuming after step {stopped}" in done.stdout
    assert rows() == stopped + 3
