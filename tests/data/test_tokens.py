"""What a tokenizer makes of documents: said in the summary, and the same in prompts."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from motifarch.data import PackedDataset
from motifarch.data.prepare import main
from motifarch.errors import UserError
from motifarch.inference.sampling import encode

TEXTS = [f"story {i}: the quick brown fox jumps over the lazy dog " + "and again " * 9 for i in range(40)]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(special: list[str]) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return bpe


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Path:
    made = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|im_end|>", "<|im_start|>"]),
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = CHAT
    made.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


class Prepared:
    """What came out of a preparation of records."""

    def __init__(self, folder: Path, records: list[dict], tokenizer: Path | None, *options: str) -> None:
        (folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        given = ["--tokenizer", str(tokenizer)] if tokenizer else ["--vocab-size", "280"]
        output = folder / "out"
        arguments = ["--source", f"files:{folder}/t.jsonl", "--output", str(output), "--num-proc", "1", *given]
        assert main([*arguments, "--seq-len", "8", *options]) == 0
        self.record = json.loads((output / "data.json").read_text())
        self.notes = "\n".join(self.record["notes"])
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(output / "tokenizer")
        blocks = [PackedDataset.open(output, split) for split in ("train", "validation")]
        self.ids = [t for split in blocks for n in range(len(split)) for t in split[n].input_ids[bool(n) :].tolist()]
        self.documents = " ".join(map(str, self.ids)).split(f" {self.record['eos_token_id']}")

    def count(self, token: str) -> int:
        return self.ids.count(self.tokenizer.convert_tokens_to_ids(token))


def records(texts: list[str]) -> list[dict]:
    return [{"text": text} for text in texts]


def test_documents_begin_as_prompts_do(tmp_path: Path) -> None:
    bpe = byte_level(["<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "given")
    made = Prepared(tmp_path, records(TEXTS), tmp_path / "given")
    assert abs(made.count("<s>") - 40) <= 1  # the last, partial block is left out
    assert "<s> its text </s>" in made.notes
    trained = " ".join(map(str, made.ids))
    assert sum(" ".join(map(str, encode(made.tokenizer, text))) in trained for text in TEXTS) >= 38


@pytest.mark.parametrize("spelled", ["text", "tokens"])
def test_special_tokens_spelled_in_text(tmp_path: Path, chat_tokenizer: Path, spelled: str) -> None:
    texts = [f"<|im_start|>user\n{text}<|im_end|>\n" for text in TEXTS]
    made = Prepared(tmp_path, records(texts), chat_tokenizer, "--special-tokens", spelled)
    assert "40 <|im_start|>" in made.notes
    assert ("stay text" in made.notes) == (spelled == "text")
    assert abs(made.count("<|im_start|>") - (40 if spelled == "tokens" else 0)) <= (spelled == "tokens")
    # A plain prompt is read as the text was; a conversation always gets the template's tokens.
    start = made.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (start in encode(made.tokenizer, texts[0])) == (spelled == "tokens")
    assert encode(made.tokenizer, [{"role": "user", "content": "hi"}]).count(start) == 2


def test_messages_become_what_chat_prompts_are(tmp_path: Path, chat_tokenizer: Path) -> None:
    chats = [[{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}] for t in TEXTS]
    made = Prepared(tmp_path, [{"messages": chat} for chat in chats], chat_tokenizer)
    assert abs(made.count("<|im_start|>") - 80) <= 2
    trained = " ".join(map(str, made.ids))
    prompts = [" ".join(map(str, encode(made.tokenizer, chat[:1]))) for chat in chats]
    assert sum(prompt in trained for prompt in prompts) >= 38


def test_messages_without_a_template_are_named(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "hi"}]}]
    made = Prepared(tmp_path, [*records(TEXTS), *chats], None)
    assert made.record["skipped"]["reasons"]["messages without a chat template"]["names"] == ["t.jsonl:41"]


def test_what_a_tokenizer_cannot_write_is_counted(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "fox": 3}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(tmp_path / "given")
    prepared = Prepared(
        tmp_path,
        records([" ".join([text] * 9) for text in ("the fox", "fox the", "The dog and the fox")]),
        tmp_path / "given",
    )
    assert "unknown: 18 tokens <unk>" in prepared.notes
    assert "first in t.jsonl:3, where 'The dog" in prepared.notes
    assert "became 'the" in prepared.notes


def test_text_that_a_tokenizer_drops_is_counted(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE())  # without bytes and without an unknown token
    bpe.train_from_iterator(["abc " * 9], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(tmp_path / "given")
    made = Prepared(tmp_path, records(["abc " * 20, "cab " * 20, "abc 한국 " * 20]), tmp_path / "given")
    assert "changed: " in made.notes
    assert "t.jsonl:3, where '한" in made.notes or "3 of 3" in made.notes


def test_odd_text_is_kept_and_named(tmp_path: Path) -> None:
    odd = ["windows\r\nline ends " * 9, "한국어".encode().decode() * 9, "bad \ufffd bytes " * 9]
    decomposed = "".join(chr(0x1112) + chr(0x1161) + chr(0x11AB) for _ in range(9))
    made = Prepared(tmp_path, records([*TEXTS, *odd, decomposed]), None)
    assert made.record["skipped"]["count"] == 0
    for line in ("1 document with Windows line ends", "1 document with decomposed Hangul", "1 document with replac"):
        assert line in made.notes
    assert "changed" not in made.notes


def test_a_given_tokenizers_truncation_and_padding_cut_nothing(tmp_path: Path) -> None:
    bpe = byte_level(["</s>"])
    bpe.enable_truncation(5)
    bpe.enable_padding(length=20)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>", model_max_length=5)
    made.save_pretrained(tmp_path / "given")
    prepared = Prepared(tmp_path, records(TEXTS), tmp_path / "given")
    assert "changed" not in prepared.notes
    assert prepared.record["splits"]["train"]["tokens"] > 40 * 20


def test_one_text_file_keeps_its_end_for_validation(tmp_path: Path) -> None:
    lines = [f"line {number} of the only file\n" for number in range(400)]
    (tmp_path / "input.txt").write_text("".join(lines))
    arguments = ["--source", f"files:{tmp_path}/input.txt", "--output", str(tmp_path / "out"), "--vocab-size", "280"]
    assert main([*arguments, "--seq-len", "16", "--num-proc", "1", "--validation-fraction", "0.1"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    texts = {}
    for split in ("train", "validation"):
        data = PackedDataset.open(tmp_path / "out", split)
        ids = [t for n in range(len(data)) for t in data[n].input_ids[bool(n) :].tolist()]
        texts[split] = tokenizer.decode(ids)
    assert texts["train"].startswith("line 0 of")
    assert texts["validation"].startswith(("line 359 of", "line 360 of", "line 361 of"))
    assert "only document" in json.loads((tmp_path / "out" / "data.json").read_text())["notes"][0]


def test_names_that_are_not_utf8(tmp_path: Path, make_text: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    folder = os.fsencode(tmp_path) + b"/" + "자료".encode("cp949")
    os.mkdir(folder)
    for number in range(12):
        with open(folder + b"/" + f"문서{number}.txt".encode("cp949"), "w") as file:
            file.write(make_text(number))
    with open(folder + b"/" + "빈".encode("cp949"), "w"):
        pass
    arguments = ["--source", os.fsdecode(b"files:" + folder), "--output", str(tmp_path / "out"), "--vocab-size", "280"]
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/" + "결과".encode("cp949"))
    with pytest.raises(UserError, match="its name is not UTF-8"):
        main([*arguments, "--output", odd])
    for _ in range(2):
        assert main([*arguments, "--seq-len", "16", "--num-proc", "1"]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "data.json").read_text())["skipped"]["count"] == 1
