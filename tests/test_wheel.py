"""The source distribution, and the wheel in an environment that has the dependencies and nothing of
this checkout.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import motifarch
from motifarch.cli import COMMANDS

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is in the repository is asked of git: needs a clone"),
]


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, away from the checkout."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked(*folders: str) -> list[str]:
    listed = ["git", "ls-files", *folders]
    return subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both distributions, as `make dist` makes them: the wheel from the other."""
    folder = tmp_path_factory.mktemp("dist")
    # Of a copy: what an older build left in the checkout would be packed too.
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name, follow_symlinks=False)
    # Without the package index, the tools are those of this environment.
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    run(*build, folder / "source", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


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
    expected = {
        name.removeprefix("kernels/").replace("recipes/", "motifarch/recipes/", 1 if name.startswith("recipes") else 0)
        for name in tracked("motifarch", "kernels/motif_kernels", "recipes")
        if Path(name).suffix != ".md" and name != "motifarch/recipes"
    }
    assert not expected - set(zipfile.ZipFile(wheel).namelist())


def test_the_source_distribution_is_the_repository(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not set(tracked()) - held


def test_both_have_the_version(built: Path, wheel: Path) -> None:
    assert wheel.name.split("-")[1] == motifarch.__version__
    assert next(built.glob("*.tar.gz")).name == f"motifarch-{motifarch.__version__}.tar.gz"


def test_packages_import_from_it(installed: Path, tmp_path: Path) -> None:
    code = "import motifarch.layers, motifarch.models, motif_kernels as k; print(motifarch.layers.__file__, k.__file__)"
    environment = str(installed.parent)
    assert all(file.startswith(environment) for file in run(installed / "python", "-c", code, cwd=tmp_path).split())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_commands_explain_themselves(installed: Path, tmp_path: Path, command: str) -> None:
    assert "usage: " in run(installed / "motifarch", *command.split(), "--help", cwd=tmp_path)


def test_launch_scripts_come_with_it(installed: Path, tmp_path: Path) -> None:
    code = "from motifarch import packaged_recipes; print(packaged_recipes.FOLDER)"
    recipes = Path(run(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert os.access(recipes / "tiny_cpu.sh", os.X_OK)
    command = ("env", "DRY_RUN=1", "GPUS=2", recipes / "launch" / "torchrun.sh", "tiny_cpu")
    assert "-m motifarch.train tiny_cpu" in run(*command, cwd=tmp_path)


def test_two_steps_of_a_recipe_that_comes_with_it(installed: Path, tmp_path: Path) -> None:
    motifarch = installed / "motifarch"
    sizes = ("--max-documents", "30", "--vocab-size", "300", "--seq-len", "32")
    run(motifarch, "data", "prepare", "--source", "stdlib", "--output", "data", *sizes, cwd=tmp_path)
    steps = ("--run.steps", "2", "--optim.warmup_steps", "1", "--optim.decay_steps", "1", "--validation.every", "0")
    data = ("--data.datasets", "[{path: data}]", "--run.output", "run")
    run(motifarch, "train", "tiny_cpu", *data, *steps, cwd=tmp_path)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
