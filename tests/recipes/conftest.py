"""A tiny dataset for the shrunken copies of the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny import prepare_text, write_recipe


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    """A recipe file for a model of two layers, writing into `tmp_path / "run"`."""
    return write_recipe(tmp_path, data)
