"""Vocabularies that tests share."""

import pytest
from tokenizers import Tokenizer

from helpers.vocabularies import SIZE, STAGE_1, made_texts
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.superbpe import train_superbpe
from motifarch.tokenizer.train import train_bpe


@pytest.fixture(scope="session")
def special() -> SpecialTokens:
    """All that there are."""
    return SpecialTokens()


@pytest.fixture(scope="session")
def words(special: SpecialTokens) -> Tokenizer:
    """A BPE."""
    return train_bpe(made_texts(), SIZE, special)


@pytest.fixture(scope="session")
def superwords(special: SpecialTokens) -> Tokenizer:
    """A SuperBPE as large."""
    return train_superbpe(made_texts(), SIZE, special, stage_1_size=STAGE_1)
