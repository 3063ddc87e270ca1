import json
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from motifarch.errors import UserError
from motifarch.tokenizer.loading import load_tokenizer, open_vocabulary, tokenizer_fingerprint, vocabulary_size
from motifarch.tokenizer.special_tokens import END_OF_TEXT
from motifarch.tokenizer.train import capped, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tokenizer_folder)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_composed(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= token < vocabulary_size(tokenizer) for token in ids)


def test_training_gives_the_size_asked_for_and_compresses(
    tokenizer: PreTrainedTokenizerBase, make_text: Callable[..., str]
) -> None:
    text = make_text(1000)
    assert len(tokenizer) == vocabulary_size(tokenizer) == 300
    assert len(tokenizer(text)["input_ids"]) < len(text) / 2
    assert tokenizer.decode([tokenizer.eos_token_id]) == END_OF_TEXT


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="--vocab-size 257: it must be at least 258"):
        train_tokenizer(["text"], 257)


def test_fingerprint_is_of_what_it_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, make_text: Callable[..., str]
) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    copy(["used", "with padding"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(copy) == fingerprint
    copy.add_tokens(["<new>"])
    assert tokenizer_fingerprint(copy) != fingerprint
    other = train_tokenizer((make_text(seed, words=400) for seed in range(5)), 280)
    assert tokenizer_fingerprint(other) != fingerprint


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


def test_a_tokenizers_file_means_its_folder(tokenizer_folder: Path) -> None:
    loaded = load_tokenizer(tokenizer_folder / "tokenizer.json")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(load_tokenizer(tokenizer_folder))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_fast_form_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert not load_tokenizer(tmp_path).is_fast
    with pytest.raises(UserError, match="is a ByT5Tokenizer, which has no fast form"):
        open_vocabulary(tmp_path)


def test_beside_a_model_that_transformers_does_not_know_it_loads_without_warnings(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "of_somebody", "rope_scaling": None, "rope_theta": 10_000.0}  # an export's, in short
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(tokenizer)


def test_capped() -> None:
    assert list(capped(["abc", "defg", "hij"], 5)) == ["abc", "de"]
    assert list(capped(["abc"], 5)) == ["abc"]
