"""Figures of tokenizers, against counts by hand."""

import json
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.tokenizer.measure import measure
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.train import as_pretrained


def of_words(words: list[str]) -> PreTrainedTokenizerFast:
    """A token for each of the words, in lower case, and one for all others."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: i for i, word in enumerate(words, 1)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[UNK]")


def test_counts_by_hand() -> None:
    tokenizer = of_words(["a", "model", "그", "unused"])
    texts = [("en", "A model a"), ("en", "a model"), ("ko", "그 model"), ("en", "a")]
    found = measure({"mine": tokenizer}, texts).as_dict()["mine"]
    assert found["groups"]["en"] == {
        "documents": 3,
        "bytes": 17,
        "tokens": 6,
        "bytes_per_token": 17 / 6,
        "characters_per_token": 17 / 6,
        "tokens_per_word": 1.0,
        "changed_documents": 1,
        "composed_documents": 0,
    }
    assert (found["groups"]["ko"]["bytes_per_token"], found["groups"]["ko"]["characters_per_token"]) == (4.5, 3.5)
    assert found["unused_share"] == 1 / 4  # of a, model, 그, unused
    assert found["longest_tokens"] == ["model", "a", "그"]
    assert found["vocab_size"] == 5


def test_text_in_many_batches_is_counted_once(words: Tokenizer, special: SpecialTokens) -> None:
    tokenizer = as_pretrained(words, special)
    text = "모델을 학습하는 방법은 다음과 같습니다. " * 3000
    decomposed = unicodedata.normalize("NFD", "한국어")
    texts = [("ko", text)] * 40 + [("ko", decomposed)]
    found = measure({"words": tokenizer}, texts).as_dict()["words"]["groups"]["ko"]
    assert found["tokens"] == 40 * len(words.encode(text).ids) + len(words.encode(decomposed).ids)
    assert found["bytes"] == 40 * len(text.encode()) + len(decomposed.encode())
    assert (found["changed_documents"], found["composed_documents"]) == (0, 1)


def test_the_command_compares(
    words: Tokenizer,
    superwords: Tokenizer,
    special: SpecialTokens,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, tokenizer in (("words", words), ("_super $x$", superwords)):
        as_pretrained(tokenizer, special).save_pretrained(tmp_path / name)
    (tmp_path / "ko.txt").write_text("모델을 학습하는 방법은 다음과 같습니다.\n" * 20)
    (tmp_path / "en.txt").write_text("This is how a model of language is trained on text, and compared.\n" * 20)
    sources = [f"--source=files:{tmp_path / name}" for name in ("ko.txt", "en.txt")]
    tokenizers = [str(tmp_path / name) for name in ("words", "_super $x$")]
    output = tmp_path / "figures"
    assert run(["tokenizer", "measure", *tokenizers, *sources, "--by", "language", "--output", str(output)]) == 0
    figures = json.loads((output / "measure.json").read_text())
    for found in figures.values():
        assert found["groups"].keys() == {"ko", "en"}
    plain, of_super = (figures[name]["groups"]["ko"]["bytes_per_token"] for name in tokenizers)
    assert of_super > 1.1 * plain
    assert (output / "measure.png").read_bytes().startswith(b"\x89PNG")
    assert f"{plain:.3f}" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"no text in .*empty"):
        run(["tokenizer", "measure", "bpe-openai:cl100k_base", f"--source=files:{tmp_path / 'empty.txt'}"])
    with pytest.raises(UserError, match="cannot load tokenizer"):
        run(["tokenizer", "measure", str(tmp_path / "none"), f"--source=files:{tmp_path / 'empty.txt'}"])
