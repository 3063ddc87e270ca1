"""A tiny dataset and a tiny recipe that the training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny import prepare_text, write_recipe


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a few hundred blocks of 32 tokens."""
    return prepare_text(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    """A recipe file for a model of two layers, writing into `tmp_path / "run"`."""
    return write_recipe(tmp_path, data)
