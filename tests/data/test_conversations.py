"""Conversations with a loss mask: what is trained, what is cut, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny import CHAT, write_conversations
from motifarch.data import PackedDataset, collate
from motifarch.data.packing import DocumentPacker
from motifarch.data.prepare import main
from motifarch.errors import UserError
from motifarch.layers import IGNORE_INDEX
from motifarch.tokenizer.loading import load_tokenizer


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT)
    return path


def prepare(output: Path, source: Path, tokenizer: Path, *options: str) -> dict[str, Any]:
    command = ["--messages", "--source", f"files:{source}", "--tokenizer", str(tokenizer), "--output", str(output)]
    assert main([*command, "--num-proc", "1", "--seq-len", "64", "--validation-fraction", "0.3", *options]) == 0
    return json.loads((output / "data.json").read_text())  # type: ignore[no-any-return]


def documents(folder: Path) -> list[tuple[list[int], list[bool]]]:
    """Every document with its mask; padding, which is never trained, is left out."""
    found = []
    for split in ("train", "validation"):
        data = PackedDataset.open(folder, split)
        for block in (data[i] for i in range(len(data))):
            assert block.loss_mask is not None
            bounds = np.cumsum(block.doc_lengths)[:-1]
            pieces = zip(np.split(block.input_ids, bounds), np.split(block.loss_mask, bounds), strict=True)
            found += [(ids.tolist(), mask.tolist()) for ids, mask in pieces if mask.any()]
    return found


def test_the_mask_is_that_of_transformers(tmp_path: Path, tokenizer_folder: Path, template: Path) -> None:
    conversations = write_conversations(tmp_path / "chats.jsonl")
    record = prepare(tmp_path / "data", tmp_path / "chats.jsonl", tokenizer_folder, "--chat-template", str(template))
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = CHAT
    expected = [
        tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        for messages in conversations
    ]
    most = 65
    kept = sorted((one["input_ids"][:most], [bool(m) for m in one["assistant_masks"][:most]]) for one in expected)
    assert sorted(documents(tmp_path / "data")) == [one for one in kept if any(one[1])]
    longer = {f"chats.jsonl:{n}" for n, one in enumerate(expected, 1) if len(one["input_ids"]) > most}
    assert longer
    assert record["truncated"]["count"] == len(longer)
    (reason,) = record["truncated"]["reasons"].values()
    assert set(reason["names"]) == longer
    splits = record["splits"].values()
    assert sum(n["trained_tokens"] for n in splits) == sum(sum(mask) for _, mask in kept)
    assert sum(n["dropped_tokens"] for n in splits) == sum(max(0, len(one["input_ids"]) - most) for one in expected)
    assert sum(n["documents"] for n in splits) == len(conversations)
    # As it was written, the template goes on with the tokenizer, and so into an export.
    assert load_tokenizer(tmp_path / "data" / "tokenizer").chat_template == CHAT


def test_targets_are_the_assistants_tokens(tmp_path: Path, tokenizer_folder: Path, template: Path) -> None:
    rows = [{"messages": messages, "n": 1} for messages in write_conversations(tmp_path / "chats.jsonl")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    prepare(tmp_path / "data", tmp_path / "chats.parquet", tokenizer_folder, "--chat-template", str(template))
    data = PackedDataset.open(tmp_path / "data")
    blocks = [data[i] for i in range(len(data))]
    labels = collate(blocks)["shift_labels"].view(len(blocks), 64).numpy()
    for block, targets in zip(blocks, labels, strict=True):
        first = np.isin(np.arange(65), np.cumsum([0, *block.doc_lengths[:-1]]))
        expected = np.where(block.loss_mask & ~first, block.input_ids, IGNORE_INDEX)[1:]  # type: ignore[operator]
        assert targets.tolist() == expected.tolist()


def test_the_summary_names_what_is_cut_and_left_out(
    tmp_path: Path, tokenizer_folder: Path, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_conversations(tmp_path / "chats.jsonl")
    says = [{"role": "user", "content": "only a question"}]
    late = [{"role": "user", "content": "x y z " * 90}, {"role": "assistant", "content": "late"}]
    lines = [{"messages": says}, {"messages": late}, {"text": "no conversation"}]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--chat-template", str(template), "--source", f"files:{tmp_path / 'more.jsonl'}")
    record = prepare(tmp_path / "data", tmp_path / "chats.jsonl", tokenizer_folder, *options)
    names = [name for found in record["skipped"]["reasons"].values() for name in found["names"]]
    assert sorted(names) == ["more.jsonl:1", "more.jsonl:2", "more.jsonl:3"]
    said = capsys.readouterr().out
    assert all(name in said for name in (*names, next(iter(record["truncated"]["reasons"].values()))["names"][0]))
    with pytest.raises(UserError, match=r"--strict: more\.jsonl"):
        prepare(tmp_path / "strict", tmp_path / "chats.jsonl", tokenizer_folder, *options, "--strict")


@pytest.mark.parametrize("marks", [False, True])
def test_a_template_without_marks_is_one_error(tmp_path: Path, tokenizer_folder: Path, marks: bool) -> None:
    write_conversations(tmp_path / "chats.jsonl")
    options = []
    if marks:
        (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        options = ["--chat-template", str(tmp_path / "bare.jinja")]
    with pytest.raises(UserError, match=r"\{% generation %\}" if marks else "has no chat template"):
        prepare(tmp_path / "data", tmp_path / "chats.jsonl", tokenizer_folder, *options)
    assert not (tmp_path / "data").exists()


def test_messages_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--messages without --tokenizer"):
        main(["--messages", "--source", "stdlib", "--output", str(tmp_path / "data")])


def test_another_template_is_other_data(tmp_path: Path, tokenizer_folder: Path, template: Path) -> None:
    # Only the marks differ: the same text, of which less is trained.
    write_conversations(tmp_path / "chats.jsonl")
    options = ("--chat-template", str(template))
    one = prepare(tmp_path / "one", tmp_path / "chats.jsonl", tokenizer_folder, *options)
    narrower = CHAT.replace("message.content + eos_token", "message.content")
    template.write_text(narrower.replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- eos_token -}}"))
    with pytest.raises(UserError, match="prepared differently"):
        prepare(tmp_path / "one", tmp_path / "chats.jsonl", tokenizer_folder, *options)
    two = prepare(tmp_path / "two", tmp_path / "chats.jsonl", tokenizer_folder, *options)
    assert one["fingerprint"] != two["fingerprint"]
    assert any("without a trained <|endoftext|>" in note for note in two["notes"])
    assert not any("train no" in note for note in one["notes"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 17), max_size=300), st.integers(0, 5))
def test_whole_documents_are_packed_once(lengths: list[int], seed: int) -> None:
    packer, draw = DocumentPacker(16, padding=-1), random.Random(seed)
    given_ = [np.array([draw.randrange(1, 100) for _ in range(n)], dtype=np.int32) for n in lengths]
    blocks = [block for tokens in given_ for block in packer.add(tokens)]
    blocks += packer.finish()
    found = []
    for block in blocks:
        assert len(block.input_ids) == block.doc_lengths.sum() == 17
        pieces = np.split(block.input_ids, np.cumsum(block.doc_lengths)[:-1])
        found += [tuple(piece) for piece in pieces if piece[0] != -1]
    assert sorted(found) == sorted(map(tuple, given_))
    assert packer.padding_tokens == 17 * len(blocks) - sum(lengths)
    # Two blocks that were open together hold more than a block's worth: padding is bounded.
    assert len(blocks) <= 2 * sum(lengths) / 17 + 1
