"""Reads other people's model folders: whatever is wrong in one is said in a line, with its file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motifarch.errors import UserError, one_line
from motifarch.files import read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"

_OBJECTS = (
    *(CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "model.safetensors.index.json"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_json_files(folder: Path) -> None:
    """Checks that each of a model folder's JSON files that is there holds an object, and that its
    token ids are ids: libraries that read them take some damages for a file that is not there.

    Raises:
        UserError: naming the file.
    """
    for name in _OBJECTS:
        if os.path.lexists(folder / name):
            content = read_object(folder / name)
            if name in (CONFIG, GENERATION):
                _check_token_ids(content, folder / name)


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: it can't be read, is no JSON, or holds something else.
    """
    try:
        content = read_json(file)
    except ValueError as error:
        raise UserError(f"{file} {error}; copy or export the folder anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, no object; copy or export the folder anew")
    return content


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Makes one message of what libraries raise over damaged files: errors of every kind.

    Raises:
        UserError: the block raised another error than that, or than a lack of memory.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust's tokenizers is no Exception
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise UserError(f"{what}: {one_line(error)}; copy or export it anew") from None


def _check_token_ids(fields: dict[str, Any], file: Path) -> None:
    for name in _TOKENS:
        value = fields.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        for token in ids:
            known = isinstance(token, int) and not isinstance(token, bool) and -1 <= token < 2**31
            if not known and not (token is None and value is None):
                raise UserError(
                    f"{file} has {name} {value!r:.60}; accepted: a token's id, or null; mend or copy it anew"
                )


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers shows no bars: it has one for every file that it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
