"""A short run that is trained once for a file's tests."""

import shutil
from pathlib import Path

import pytest

from helpers.tiny import SHORT_RUN, write_recipe
from motifarch.train.main import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """A recipe and the output folder of its run, with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, data)
    assert main([str(recipe), *SHORT_RUN]) == 0
    return recipe, folder / "run"


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return shutil.copytree(finished[1], tmp_path / "copy")
