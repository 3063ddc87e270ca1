"""A short run that is trained once for a file's tests."""

import shutil
from pathlib import Path

import pytest

from helpers.fine_tuning import SEQ_LEN
from helpers.tiny import SHORT_RUN, prepare_conversations, write_recipe
from motifarch.export import export
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


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Conversations, prepared with the tokenizer that the model was trained with."""
    return prepare_conversations(tmp_path_factory.mktemp("chats"), data / "tokenizer", seq_len=SEQ_LEN)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """An exported model to fine-tune."""
    return export(finished_run, tmp_path_factory.mktemp("base") / "base")
