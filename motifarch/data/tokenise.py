"""Parallel tokenisation of a corpus."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TypeVar

import datasets
import multiprocess  # type: ignore[import-untyped]  # what datasets forks with
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from motifarch.data.arrow_files import list_column
from motifarch.data.tokenizer import vocabulary_size
from motifarch.die_with_parent import signal_at_parents_death
from motifarch.errors import UserError

T = TypeVar("T")


def tokenise(
    scratch: Path, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int
) -> datasets.Dataset:
    """Turn text into token ids, each document ended by the end-of-text token.

    Rows hold text and split_hash; the result does not depend on the number of processes.

    Returns:
        input_ids (int32 list), split_hash: memory-mapped in ``scratch``, in the order of ``rows``.

    Raises:
        UserError: if the tokenizer makes an id outside its vocabulary.
    """
    vocab_size = vocabulary_size(tokenizer)

    def encode(table: pa.Table) -> pa.Table:
        # Text is text: an end-of-text token spelled out in a document does not end it.
        encoded = tokenizer(
            table.column("text").to_pylist(),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        documents = [np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded["input_ids"]]
        largest = max(int(document.max()) for document in documents)
        if largest >= vocab_size:
            raise UserError(f"the tokenizer made token id {largest}, outside its vocabulary of {vocab_size}: mend it")
        return pa.table({"input_ids": list_column(documents), "split_hash": table.column("split_hash")})

    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "split_hash": datasets.Value("uint64")}
    )
    work = partial(
        rows.with_format("arrow").map,
        encode,
        batched=True,
        batch_size=100,
        writer_batch_size=1000,
        remove_columns=["text"],
        features=features,
        num_proc=min(num_proc, len(rows)) if num_proc > 1 else None,
        cache_file_name=str(scratch / "tokens.arrow"),
        new_fingerprint="tokenised",
        desc="tokenising",
    )
    return _run_pool(work) if num_proc > 1 else work()


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
