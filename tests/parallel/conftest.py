"""A tiny dataset that the sharded tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny import prepare_text


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a few hundred blocks of 32 tokens."""
    return prepare_text(tmp_path_factory.mktemp("prepared"))
