"""The wheel in an environment that has the dependencies and nothing of this checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from motifarch.cli import COMMANDS

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, away from the checkout."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Of a copy: what an older build left in the checkout would be packed too.
    for name in ("motifarch", "kernels", "recipes"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, folder / "source", cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of the commands of an environment with the wheel in it."""
    environment = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    commands = environment / "bin"
    python = commands / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, wheel, cwd=wheel.parent)
    # Named in a path file, the dependencies' folder has no path files of its own: an editable
    # install there does not count.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return commands


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "motifarch", "kernels/motif_kernels", "recipes"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    expected = {
        name.removeprefix("kernels/").replace("recipes/", "motifarch/recipes/", 1 if name.startswith("recipes") else 0)
        for name in listed
        if Path(name).suffix not in (".md", ".sh") and name != "motifarch/recipes"
    }
    assert not expected - set(zipfile.ZipFile(wheel).namelist())


def test_packages_import_from_it(installed: Path, tmp_path: Path) -> None:
    code = "import motifarch.layers, motifarch.models, motif_kernels as k; print(motifarch.layers.__file__, k.__file__)"
    environment = str(installed.parent)
    assert all(file.startswith(environment) for file in run(installed / "python", "-c", code, cwd=tmp_path).split())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_commands_explain_themselves(installed: Path, tmp_path: Path, command: str) -> None:
    assert "usage: " in run(installed / "motifarch", *command.split(), "--help", cwd=tmp_path)


def test_two_steps_of_a_recipe_that_comes_with_it(installed: Path, tmp_path: Path) -> None:
    motifarch = installed / "motifarch"
    sizes = ("--max-documents", "30", "--vocab-size", "300", "--seq-len", "32")
    run(motifarch, "data", "prepare", "--source", "stdlib", "--output", "data", *sizes, cwd=tmp_path)
    steps = ("--run.steps", "2", "--optim.warmup_steps", "1", "--optim.decay_steps", "1", "--validation.every", "0")
    data = ("--data.datasets", "[{path: data}]", "--run.output", "run")
    run(motifarch, "train", "tiny_cpu", *data, *steps, cwd=tmp_path)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
