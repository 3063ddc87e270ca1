"""Files of prompts, and the file of what a model made of them."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motifarch.errors import UserError
from motifarch.inference.sampling import Prompt

_JSONL = (".jsonl", ".ndjson")
_RESULTS = ("text", "tokens", "finish")
_ACCEPTED = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Request:
    """A line of a prompt file: its prompt, its name in errors, and what its result repeats."""

    prompt: Prompt
    name: str
    line: dict[str, Any]


def conversation(text: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of one user message, after a system message if there is one."""
    return _with_system([{"role": "user", "content": text}], system)


def read_prompts(path: Path, *, chat: bool = False, system: str | None = None) -> list[Request]:
    """Read a text file with a prompt a line, or a .jsonl file with a "prompt" or "messages" a line.

    The file is in UTF-8. Blank lines are passed over; a .jsonl line may hold other keys beside.
    ``chat`` makes each prompt a user message; ``system`` goes before every conversation that does
    not start with a system message of its own.

    Raises:
        UserError: the file cannot be read, holds no prompt, or has a line that is no prompt; the
            message names it.
    """
    if path.suffix.lower() == ".json":
        raise UserError(f"{path} is JSON; give a text file with a prompt a line, or a .jsonl file of {_ACCEPTED}")
    try:
        # Not splitlines: text may hold other separators, and only a newline ends a line of JSONL.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"the prompts {path} cannot be read: {error.strerror}; give a file that can") from None
    requests = []
    for number, raw in enumerate(lines, start=1):
        name = f"{path}, line {number}"
        try:
            text = raw.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name} is not UTF-8 (byte {raw[error.start]:#04x} at place {error.start + 1}); convert the file, "
                "for example with iconv"
            ) from None
        if not text.strip():
            continue
        line = _object(text, name) if path.suffix.lower() in _JSONL else {"prompt": text}
        requests.append(Request(_prompt(line, chat, system), name, line))
    if not requests:
        kind = "an object" if path.suffix.lower() in _JSONL else "a prompt"
        raise UserError(f"{path} holds no prompt; write {kind} on each line")
    if system is not None and all(isinstance(request.prompt, str) for request in requests):
        raise UserError(f"--system is given but {path} holds no conversation; add --chat, or leave --system out")
    return requests


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error}); write {_ACCEPTED}") from None
    if not isinstance(line, dict):
        raise UserError(f"{name} is a JSON {type(line).__name__}, not an object; write {_ACCEPTED}")
    if ("prompt" in line) == ("messages" in line):
        both = "both" if "prompt" in line else "neither"
        raise UserError(f'{name} has {both} of "prompt" and "messages"; write {_ACCEPTED}')
    taken = [key for key in _RESULTS if key in line]
    if taken:
        raise UserError(f'{name} has a key "{taken[0]}", where the result would go; rename it')
    if "prompt" in line and not isinstance(line["prompt"], str):
        raise UserError(f'{name} has a "prompt" that is no string: {_short(line["prompt"])}; write {_ACCEPTED}')
    if "messages" in line:
        _check_messages(line["messages"], name)
    return line


def _check_messages(messages: Any, name: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f'{name} has "messages" that are no list with messages in it: {_short(messages)}; write {_ACCEPTED}'
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(
                f'{name}: message {number} has no "role" and "content" that are strings: {_short(message)}; '
                f"write {_ACCEPTED}"
            )


def _prompt(line: dict[str, Any], chat: bool, system: str | None) -> Prompt:
    if "messages" in line:
        return _with_system(line["messages"], system)
    return conversation(line["prompt"], system) if chat else str(line["prompt"])


def _with_system(messages: list[dict[str, str]], text: str | None) -> list[dict[str, str]]:
    if text is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text}, *messages]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def result_file(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that writes a line of JSON, into a file that is in its place, instead of any
    that was there, once the block ends well.

    If the block raises, the lines so far, if any, are left in ``path`` with ".partial" added.

    Raises:
        UserError: the file cannot be written.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"--output {path} is no regular file; give a file's name")
    partial = path.with_name(path.name + ".partial")
    written = 0

    def write(result: dict[str, Any]) -> None:
        nonlocal written
        with _explained(path):
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
        written += 1

    with _explained(path):
        file = partial.open("w", encoding="utf-8")
    try:
        with file:
            yield write
            with _explained(path):
                file.flush()
                os.fsync(file.fileno())
        with _explained(path):
            partial.replace(path)
    except BaseException:
        if written:
            print(f"{partial} keeps the {written:,} results so far", file=sys.stderr)
        else:
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written: {error.strerror}; check its folder, permissions and free space"
        ) from None
