"""Text, tokenizers and prepared folders that the data tests share."""

import random
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from motifarch.data.prepare import main
from motifarch.tokenizer.train import train_tokenizer

_WORDS = ("the", "attention", "head", "sees", "one", "token", "and", "then", "another", "while", "noise", "is", "gone")


def _make_text(seed: int, words: int = 200) -> str:
    chosen = random.Random(seed)
    return f"document {seed}\n" + " ".join(chosen.choice(_WORDS) for _ in range(words)) + "\n"


@pytest.fixture(scope="session")
def make_text() -> Callable[..., str]:
    """Makes a text of its own for every seed, of as many words as asked for."""
    return _make_text


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of thirty text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(_make_text(number))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((_make_text(seed) for seed in range(100)), 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """The corpus, prepared in blocks of 32."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    arguments = ["--source", f"files:{corpus}/*.txt", "--tokenizer", str(tokenizer_folder), "--output", str(output)]
    assert main([*arguments, "--seq-len", "32", "--num-proc", "1", "--validation-fraction", "0.2"]) == 0
    return output
