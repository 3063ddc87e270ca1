"""Vocabularies: any text comes back, words and numbers are split as said, folders are ordinary."""

import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.terminal import on_a_terminal
from helpers.vocabularies import SIZE, STAGE_1, made_texts
from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.superbpe import Sample, train_superbpe
from motifarch.tokenizer.train import as_pretrained, train_bpe

KINDS = ["words", "superwords"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def random_texts(number: int) -> list[str]:
    """Of all planes, of a few scripts with marks, and of decomposed Hangul."""
    draw = random.Random(0)
    ranges = [(0, 0x10FFFF), (0, 0x7F), (0x300, 0x36F), (0x1100, 0x11FF), (0xAC00, 0xD7A3), (0x4E00, 0x9FFF)]
    ranges += [(0x9, 0x20), (0x600, 0x6FF), (0x900, 0x97F), (0x1F300, 0x1FAFF), (0x2000, 0x206F), (0x30, 0x39)]

    def character() -> str:
        while True:
            code = draw.randint(*draw.choice(ranges))
            if not 0xD800 <= code <= 0xDFFF:
                return chr(code)

    texts = ["".join(character() for _ in range(draw.randrange(24))) for _ in range(number)]
    return [unicodedata.normalize("NFD", text) if i % 3 == 0 else text for i, text in enumerate(texts)]


def test_a_hundred_thousand_texts_come_back(tokenizer: Tokenizer, special: SpecialTokens, tmp_path: Path) -> None:
    texts = random_texts(100_000)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    decoded = tokenizer.decode_batch([e.ids for e in encodings], skip_special_tokens=False)
    assert decoded == [unicodedata.normalize("NFC", text) for text in texts]

    as_pretrained(tokenizer, special).save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        again = loaded(texts[:20_000], add_special_tokens=False)["input_ids"]
        assert again == [e.ids for e in encodings[:20_000]]


def test_decomposed_hangul_costs_no_more(tokenizer: Tokenizer) -> None:
    text = "그 사람은 학교에 가지 않았다."
    assert tokenizer.encode(unicodedata.normalize("NFD", text)).ids == tokenizer.encode(text).ids


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The tokens' texts."""
    return [tokenizer.decode([token]) for token in tokenizer.encode(text, add_special_tokens=False).ids]


def test_numbers_are_groups_of_three_from_the_right(tokenizer: Tokenizer) -> None:
    text = "x = 1234567 + 2026"
    ends = set()
    place = 0
    for piece in pieces(tokenizer, text):
        place += len(piece)
        ends.add(place)
    for border in ("x = ", "x = 1", "x = 1234", "x = 1234567", "x = 1234567 + ", "x = 1234567 + 2"):
        assert len(border) in ends, border


def test_words_end_where_they_end(words: Tokenizer) -> None:
    split = words.pre_tokenizer.pre_tokenize_str
    text = "API를 사용합니다. 漢字かな! it's I'll\n\n  x"
    spans = [text[begin:end] for _, (begin, end) in split(text)]
    expected = ["API", "를", " 사용합니다", ".", " 漢字かな", "!", " it's", " I'll", "\n\n", " ", " x"]
    assert spans == expected


def test_kana_stay_whole_with_their_long_vowels(words: Tokenizer) -> None:
    text = "サーバーの設定"
    assert len(words.pre_tokenizer.pre_tokenize_str(text)) == 1


@pytest.mark.parametrize("length", range(1, 14))
def test_numbers_of_any_length(words: Tokenizer, superwords: Tokenizer, length: int) -> None:
    number = "1234567890123"[:length]
    expected = f"{int(number):,}".split(",")
    for tokenizer in (words, superwords):
        for before, after in (("", ""), ("a ", " b"), ("v", "."), (".", "x")):
            split = tokenizer.pre_tokenizer.pre_tokenize_str(before + number + after)
            assert [piece for piece, _ in split if piece.isdigit()] == expected


@pytest.mark.parametrize(
    "unit", [" ", "7", "\n", "\t", "a", "가", "-", "\u0301", " \n", "a ", "1 ", "가 나", "'s", "\r\n ", ". "]
)
def test_long_runs_are_split_without_a_panic(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (40_000 // len(unit))
    for whole in (text, f"{text}x", f"{text}\n1"):
        assert tokenizer.decode(tokenizer.encode(whole).ids, skip_special_tokens=False) == whole


def test_stage_1_is_a_prefix_and_the_rest_crosses_spaces(words: Tokenizer, superwords: Tokenizer) -> None:
    special = SpecialTokens()
    of_words = json.loads(train_bpe(made_texts(), STAGE_1, special).to_str())["model"]
    of_superwords = json.loads(superwords.to_str())["model"]
    first = len(of_words["merges"])
    assert of_superwords["merges"][:first] == of_words["merges"]
    assert {t: i for t, i in of_superwords["vocab"].items() if i < STAGE_1} == of_words["vocab"]
    assert superwords.get_vocab_size() == SIZE
    added = [superwords.decode([i]) for i in range(STAGE_1, SIZE)]
    assert sum(" " in token.strip() for token in added) > len(added) / 5
    for token in added:
        assert len(token.split()) <= 4
        assert "\n" not in token.strip("\n")
        assert not token.strip(" ") or not token.endswith(" ")
        assert token.isnumeric() <= (len(token) <= 3)


def test_superwords_take_fewer_tokens_for_other_text(words: Tokenizer, superwords: Tokenizer) -> None:
    text = "모델을 학습하는 방법은 다음과 같습니다.\n그 사람은 학교에 가지 않았다.\n" * 3
    assert len(superwords.encode(text).ids) < 0.8 * len(words.encode(text).ids)


def test_the_same_text_gives_the_same_vocabulary(superwords: Tokenizer, special: SpecialTokens) -> None:
    assert train_superbpe(made_texts(), SIZE, special, stage_1_size=STAGE_1).to_str() == superwords.to_str()


def test_a_sample_is_bounded_and_of_all_the_text() -> None:
    sample = Sample(50_000)
    lines = [f"line {i} of the text, with some words more\n" for i in range(20_000)]
    assert list(sample.watch(lines)) == lines
    assert 40_000 < sum(map(len, sample.pieces)) <= 50_000
    numbers = [int(piece.split()[1]) for piece in sample.pieces]
    assert numbers == sorted(numbers)
    assert 9_000 < sum(numbers) / len(numbers) < 11_000


def test_special_tokens_and_the_assistants_part(words: Tokenizer, special: SpecialTokens) -> None:
    tokenizer = as_pretrained(words, special, model_max_length=4096)
    assert tokenizer.model_max_length == 4096
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for token in special.tokens:
        assert tokenizer.convert_tokens_to_ids(token) < len(special.tokens)
    chat = [
        {"role": "user", "content": "무엇을 학습하나요?"},
        {"role": "assistant", "content": "모델을 학습합니다."},
        {"role": "user", "content": "왜?"},
        {"role": "assistant", "content": "x = 1"},
    ]
    found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, own in zip(found["input_ids"], found["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(trained) == "모델을 학습합니다.<|endoftext|>x = 1<|endoftext|>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat[:2], tokenize=False).startswith(prompt)


@pytest.mark.parametrize("size", [0, 256, 278])
def test_bytes_and_special_tokens_need_room(size: int, special: SpecialTokens) -> None:
    with pytest.raises(UserError, match=f"--vocab-size {size}: it must be at least 280"):
        train_bpe(["text"], size, special)


def test_text_that_is_no_unicode_is_refused(special: SpecialTokens) -> None:
    with pytest.raises(UserError, match="no Unicode"):
        train_bpe(["half of a pair: \ud83d"], 300, special)


@pytest.mark.parametrize("method", ["bpe", "superbpe"])
def test_the_command_trains_on_sources_by_weight(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ko.txt").write_text("모델을 학습하는 방법은 다음과 같습니다.\n" * 200, encoding="utf-8")
    (tmp_path / "en.jsonl").write_text('{"text": "how a model is trained on text"}\n' * 200, encoding="utf-8")
    sources = [f"--source=files:{tmp_path / name}" for name in ("ko.txt", "en.jsonl")]
    output = tmp_path / "made" / "tokenizer"
    options = ["--method", method, "--vocab-size", "400", "--output", str(output), "--weight=2", "--weight=1"]
    assert run(["tokenizer", "train", *sources, *options]) == 0
    loaded = AutoTokenizer.from_pretrained(output)
    assert len(loaded) <= 400
    assert loaded.decode(loaded("모델을 학습하는").input_ids) == "모델을 학습하는"
    with pytest.raises(UserError, match="is there already"):
        run(["tokenizer", "train", *sources, *options])


def test_each_stage_shows_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(made_texts()), encoding="utf-8")
    command = [sys.executable, "-m", "motifarch.cli", "tokenizer", "train", "--source", f"files:{tmp_path}/text.txt"]
    options = ["--method", "superbpe", "--vocab-size", str(SIZE), "--output", str(tmp_path / "made")]
    shown = on_a_terminal([*command, *options])
    stages = ("reading", "merging within words", "merging across words")
    assert sorted(shown.index(stage) for stage in stages) == [shown.index(stage) for stage in stages]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weight=1"], "1 --weight for 2 --source"),
        (["--weight=1", "--weight=0"], "--weight is .0.; accepted"),
        (["--vocab-size=100"], "--vocab-size 100: it must be at least 280"),
        (["--stage-1-size=300"], "--stage-1-size 300 is of --method superbpe"),
        (["--method=superbpe", "--stage-1-size=400"], "--stage-1-size 400: it must be below --vocab-size 400"),
    ],
)
def test_options_that_cannot_work(options: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b.txt").write_text("more text " * 100)
    sources = [f"--source=files:{tmp_path / name}" for name in ("a.txt", "b.txt")]
    with pytest.raises(UserError, match=said):
        run(["tokenizer", "train", *sources, "--vocab-size=400", f"--output={tmp_path / 'made'}", *options])
    assert not (tmp_path / "made").exists()
