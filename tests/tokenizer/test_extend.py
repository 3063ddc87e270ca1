"""New tokens for vocabularies that exist, the real o200k_base among them."""

import json
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from helpers.vocabularies import made_texts
from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.tokenizer.extend import extend
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.tiktoken_files import PACKAGES, read_ranks
from motifarch.tokenizer.train import as_pretrained

KOREAN = [
    "모델을 학습하는 방법은 다음과 같습니다.\n그 사람은 학교에 가지 않았다.",
    "토큰화기를 확장하는 방법은 다음과 같습니다. 학습률을 정합니다.",
] * 4
OTHER = ["def f(x):\n    return x + 1  # it's 1234567\n", "An English sentence, and Ünïcödé: 漢字 😀.\n\n\n  indented"]


@pytest.fixture(scope="module")
def o200k() -> Tokenizer:
    return read_ranks("bpe-openai:o200k_base")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("name", PACKAGES)
def test_vocabularies_of_packages_are_theirs(name: str, o200k: Tokenizer) -> None:
    package, _, vocabulary = name.partition(":")
    texts = [*KOREAN, *OTHER, *made_texts()][:24]
    tokenizer = o200k if name.endswith("o200k_base") else read_ranks(name)
    if package == "bpe-openai":
        bpe_openai = pytest.importorskip("bpe_openai")
        theirs = bpe_openai.get_encoding(vocabulary).encode_ordinary
    else:
        tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
        file = Path(tekken.__file__).parents[2] / "data" / f"{vocabulary}.json"
        tekkenizer = tekken.Tekkenizer.from_file(str(file))

        def theirs(text: str) -> list[int]:
            found: list[int] = tekkenizer.encode(text, bos=False, eos=False)
            return found

    for text in texts:
        assert encode(tokenizer, text) == theirs(text)
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_o200k_grows_and_text_without_new_tokens_stays(o200k: Tokenizer) -> None:
    extended, merges = extend(o200k, KOREAN, 40, script="Hangul")
    assert len(merges) > 10
    assert extended.token_to_id("".join(merges[0])) == 200_019
    assert extended.token_to_id("<|endoftext|>") == 199_999
    for token, number in o200k.get_vocab(with_added_tokens=True).items():
        assert extended.token_to_id(token) == number
    for text in [*OTHER, *made_texts()][:14]:
        assert encode(extended, text) == encode(o200k, text)
    before, after = (sum(len(encode(t, text)) for text in KOREAN) for t in (o200k, extended))
    assert after < 0.8 * before
    for text in KOREAN:
        assert extended.decode(encode(extended, text)) == text


@pytest.mark.parametrize("kind", ["words", "superwords"])
def test_a_token_is_one_of_old_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    """Where new tokens are taken apart again, the old tokens are what the old tokenizer gives."""
    old: Tokenizer = request.getfixturevalue(kind)
    extended, merges = extend(old, OTHER * 3, 60)
    size = old.get_vocab_size()
    assert extended.get_vocab_size() == size + len(merges)
    parts = {size + i: [old.token_to_id(t) or extended.token_to_id(t) for t in pair] for i, pair in enumerate(merges)}

    def taken_apart(token: int) -> list[int]:
        return [token] if token < size else [p for part in parts[token] for p in taken_apart(part)]

    new = 0
    for text in [*OTHER, *KOREAN, *made_texts()][:24]:
        text = unicodedata.normalize("NFC", text)
        ids = encode(extended, text)
        new += sum(token >= size for token in ids)
        assert [old_id for token in ids for old_id in taken_apart(token)] == encode(old, text)
    assert new


def test_special_tokens_keep_their_ids_when_more_are_added(words: Tokenizer, special: SpecialTokens) -> None:
    extended, _ = extend(words, KOREAN, 20)
    tokenizer = as_pretrained(extended, special)
    before = {token: tokenizer.convert_tokens_to_ids(token) for token in special.tokens}
    number = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer.convert_tokens_to_ids("<new>") == number
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in special.tokens} == before


def test_the_command_extends_a_folder(words: Tokenizer, special: SpecialTokens, tmp_path: Path) -> None:
    as_pretrained(words, special, model_max_length=512).save_pretrained(tmp_path / "old")
    (tmp_path / "ko.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in KOREAN))
    options = ["--source", f"files:{tmp_path / 'ko.jsonl'}", "--tokens", "20", "--output", str(tmp_path / "new")]
    assert run(["tokenizer", "extend", str(tmp_path / "old"), *options]) == 0
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("old", "new"))
    assert len(new) == len(old) + 20
    assert new.special_tokens_map == old.special_tokens_map
    assert new.chat_template == old.chat_template
    assert new.model_max_length == 512
    assert len(new(KOREAN[1]).input_ids) < len(old(KOREAN[1]).input_ids)


def test_what_cannot_be_extended_is_refused(words: Tokenizer, tmp_path: Path) -> None:
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="WordPiece: only a byte-level BPE"):
        extend(pieces, KOREAN, 10)
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="not of bytes"):
        extend(letters, KOREAN, 10)
    with pytest.raises(UserError, match="'Klingon' is no script"):
        extend(words, KOREAN, 10, script="Klingon")
    with pytest.raises(UserError, match="no Unicode"):
        extend(words, ["\ud83d"], 10)
    (tmp_path / "mine.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(UserError, match="mine is not known; known are cl100k_base, o200k_base"):
        read_ranks(str(tmp_path / "mine.tiktoken"))
    (tmp_path / "o200k_base.tiktoken").write_text("no ranks")
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        read_ranks(str(tmp_path / "o200k_base.tiktoken"))
