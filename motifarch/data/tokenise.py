"""Parallel tokenisation of a corpus."""

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import datasets
import multiprocess  # type: ignore[import-untyped]  # what datasets forks with
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from motifarch.counted import counted
from motifarch.data.arrow_files import gather, list_column
from motifarch.data.conversations import encode_conversations
from motifarch.data.corpus import Corpus
from motifarch.data.loss_mask import with_mask
from motifarch.data.mapped_pages import MappedPages
from motifarch.die_with_parent import signal_at_parents_death
from motifarch.errors import UserError
from motifarch.progress import progress
from motifarch.tokenizer.encoding import begin_tokens, encode_texts, spelled_special_tokens, takes_special_tokens
from motifarch.tokenizer.loading import as_composed, vocabulary_size

T = TypeVar("T")

_CHARACTERS_AT_ONCE = 2**20


def tokenise(
    scratch: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int,
) -> datasets.Dataset:
    """Turn text into token ids, each document ended by the end-of-text token, and messages into
    those of the chat template with their loss mask (see `motifarch.data.loss_mask`).

    The result does not depend on the number of processes.

    Returns:
        A row for each of the corpus, in their order, memory-mapped in ``scratch``: input_ids (int32
        list), split_hash, special (int32 list: special tokens spelled in the text), unknown (number
        of unknown tokens), changed (whether the tokens give another text), and bytes (of the text
        in UTF-8).

    Raises:
        UserError: if the tokenizer makes an id outside its vocabulary.
    """
    vocab_size = vocabulary_size(tokenizer)
    begin, end = begin_tokens(tokenizer), tokenizer.eos_token_id
    unknown = -1 if tokenizer.unk_token_id in (None, end) else tokenizer.unk_token_id
    spelled = spelled_special_tokens(tokenizer)
    special = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))

    def encode_some(rows: list[tuple[str, bool, str]]) -> Iterator[dict[str, Any]]:
        """Texts that are all a chat template's, or none of them."""
        texts, is_chat = [text for text, *_ in rows], rows[0][1]
        masks: list[np.ndarray] = []
        if rows[0][2]:
            conversations = list(encode_conversations(tokenizer, [messages for *_, messages in rows]))
            encoded, masks = [ids for ids, _ in conversations], [mask for _, mask in conversations]
        else:
            takes = is_chat or takes_special_tokens(tokenizer)
            encoded = encode_texts(tokenizer, texts, special_tokens=takes, begin=[] if is_chat else begin)
        # What begins a document is no part of its text.
        bare = [ids[len(begin) :] if ids[: len(begin)] == begin and not is_chat else ids for ids in encoded]
        decoded = tokenizer.batch_decode(bare, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for number, (text, ids, back) in enumerate(zip(texts, encoded, decoded, strict=True)):
            document = np.array(ids if masks or ids[-1:] == [end] else [*ids, end], dtype=np.int64)
            largest = int(document.max())
            if largest >= vocab_size:
                raise UserError(
                    f"the tokenizer made token id {largest}, outside its vocabulary of {vocab_size}: mend it"
                )
            yield {
                "input_ids": with_mask(document, masks[number]) if masks else document,
                "special": np.array([] if is_chat else [spelled[token] for token in special.findall(text)], np.int64),
                "unknown": ids.count(unknown),
                "changed": back != as_composed(text, tokenizer),
                "bytes": len(text.encode()),
            }

    def encode(table: pa.Table) -> pa.Table:
        columns = (table.column(name) for name in ("text", "is_chat", "messages"))
        texts = ((text.as_py(), chat.as_py(), messages.as_py()) for text, chat, messages in zip(*columns, strict=True))
        done = [
            one
            for _, alike in groupby(texts, key=lambda row: row[1])
            for some in gather(alike, lambda row: len(row[0]), _CHARACTERS_AT_ONCE)
            for one in encode_some(some)
        ]
        lists = {name: list_column([one[name] for one in done]) for name in ("input_ids", "special")}
        plain = {name: pa.array([one[name] for one in done]) for name in ("unknown", "changed", "bytes")}
        advance(len(table))
        MappedPages(table).give_back()
        return pa.table({**lists, **plain, "split_hash": table.column("split_hash")})

    integers = datasets.List(datasets.Value("int32"))
    kinds = {"unknown": "int64", "changed": "bool", "bytes": "int64", "split_hash": "uint64"}
    features = {"input_ids": integers, "special": integers} | {n: datasets.Value(kind) for n, kind in kinds.items()}
    rows = corpus.rows
    work = partial(
        rows.with_format("arrow").map,
        encode,
        batched=True,
        batch_size=min(100, max(1, 16 * _CHARACTERS_AT_ONCE // corpus.longest)),
        writer_batch_size=1000,
        remove_columns=rows.column_names,
        features=datasets.Features(features),
        num_proc=min(num_proc, len(rows)) if num_proc > 1 else None,
        cache_file_name=str(scratch / "tokens.arrow"),
        new_fingerprint="tokenised",
    )
    with progress("tokenising", len(rows)) as advance:
        return _run_pool(work) if num_proc > 1 else work()


def describe_tokens(
    rows: datasets.Dataset, tokenised: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What the tokenizer makes of the documents' text, a line for each thing to know."""
    notes = []
    if not rows[0]["messages"]:
        begin = "".join(f"{token} " for token in tokenizer.convert_ids_to_tokens(begin_tokens(tokenizer)))
        notes = [f"a document's tokens: {begin}its text {tokenizer.eos_token}"]
    table = tokenised.data.table
    specials, unknown, changed = (table.column(name) for name in ("special", "unknown", "changed"))

    counts = Counter(
        dict(zip(*map(pa.Array.to_pylist, pc.value_counts(pc.list_flatten(specials)).flatten()), strict=True))
    )
    if counts:
        first = _first(rows, pc.greater(pc.list_value_length(specials), 0))
        names = ", ".join(f"{n:,} {tokenizer.convert_ids_to_tokens(token)}" for token, n in counts.most_common(5))
        fate = (
            "became those tokens"
            if takes_special_tokens(tokenizer)
            else "stay text, in training and in plain prompts, while a chat template writes the tokens: if the text is "
            "such a template's, give --special-tokens tokens"
        )
        notes.append(f"special tokens spelled in the text ({names}; first in {first}) {fate}")
    if total := pc.sum(unknown).as_py():
        first = _first(rows, pc.greater(unknown, 0))
        notes.append(
            f"unknown: {counted(total, 'token')} {tokenizer.unk_token}, for text that the tokenizer has no token for "
            f"(first in {first}): take a tokenizer of all bytes, or train one"
        )
    if number := pc.sum(changed).as_py():
        notes.append(
            f"changed: {number:,} of {len(rows):,} documents do not come back from their tokens as they were "
            f"({_first_change(rows, changed, tokenizer)})"
        )
    return notes


def _first(rows: datasets.Dataset, chosen: pa.ChunkedArray) -> str:
    return str(rows[pc.index(chosen, True).as_py()]["name"])


def _first_change(rows: datasets.Dataset, changed: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase) -> str:
    row = rows[pc.index(changed, True).as_py()]
    text: str = row["text"][:_CHARACTERS_AT_ONCE]
    special = row["is_chat"] or takes_special_tokens(tokenizer)
    text = as_composed(text, tokenizer)
    (ids,) = encode_texts(tokenizer, [text], special_tokens=special, begin=[])
    back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    place = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return f"first in {row['name']}, where {text[place : place + 20]!r} became {back[place : place + 20]!r}"


# True while _run_pool forks. Whatever else forks does so as it likes.
_forks_pool = False


def _run_pool(work: Callable[[], T]) -> T:
    """Call what starts a process pool, so that Ctrl-C ends all of it, and at once.

    Left to themselves, the processes of a pool each print a traceback at Ctrl-C, wait forever for a
    parent that was killed, and Ctrl-C is lost when it meets the parent in the middle of a fork. So
    the pool is run by a thread, which signals do not reach; its processes ignore Ctrl-C and are
    ended from here.
    """
    global _forks_pool
    before = set(multiprocess.active_children())
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    _forks_pool = True
    try:
        threading.Thread(target=run, daemon=True, name="tokenise").start()
        return outcome.result()
    except KeyboardInterrupt:
        for _ in range(20):  # for a second, as the pool may still be starting or replacing its processes
            for child in set(multiprocess.active_children()) - before:
                child.kill()
            if wait([outcome], timeout=0.05).done:
                break
        raise
    finally:
        _forks_pool = False


def _after_fork() -> None:
    if _forks_pool:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal_at_parents_death(signal.SIGKILL)


os.register_at_fork(after_in_child=_after_fork)
