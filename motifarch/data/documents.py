"""A document, or the reason why there is none: what every source yields."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from motifarch.counted import counted
from motifarch.errors import first_line

LONGEST = 2**22
"""Characters of the longest document; what is longer is cut, so that memory stays bounded."""

_NAMES_KEPT = 100
_NAMES_SHOWN = 3
_ABSENT = object()


@dataclass(frozen=True)
class ReadOptions:
    """How text is found in files and records."""

    text_field: str = "text"
    """Field of a record's text; ``a.b`` is field b of the object in field a."""
    encoding: str = "utf-8"
    """Of files that do not begin with a byte order mark."""
    separator: str | None = None
    """What ends a document within a text file; None makes a file one document."""
    chat_text: Callable[[list[dict[str, Any]]], str] | None = None
    """Writes a conversation as text; None if there is no chat template."""


@dataclass(frozen=True)
class Document:
    """One text: a file, or a record of a file or dataset, or a part of a long one."""

    name: str
    text: str
    part: int = 0
    """Number of the part, from 1, of a document that was cut."""
    is_chat: bool = False
    """Whether a chat template wrote it, and with it the special tokens in it."""
    messages: str = field(default="", compare=False)
    """As JSON, what the chat template wrote it of."""


@dataclass(frozen=True)
class Skipped:
    """A file or record that holds no usable text."""

    name: str
    reason: str
    detail: str = field(default="", compare=False)
    """What may help to mend it."""


@dataclass(frozen=True)
class Filtered:
    """A document that an option leaves out: a duplicate, or one in another language."""

    name: str
    reason: str
    detail: str = field(default="", compare=False)
    """What else to know of it."""


@dataclass(frozen=True)
class Noticed:
    """Something that whoever prepares the data should know, and that leaves no text out."""

    name: str
    what: str


Found = Document | Skipped | Filtered | Noticed


def printable(name: str | os.PathLike[str]) -> str:
    """A name as text that can be printed and stored: bytes that are not UTF-8 become escapes."""
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def document(name: str, content: object) -> Document | Skipped:
    """Check a file's bytes or a record's text."""
    if isinstance(content, bytes):
        if b"\0" in content:
            return Skipped(name, "binary")
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Skipped(name, "not UTF-8")
    if not isinstance(content, str):
        return Skipped(name, "no text", detail=type(content).__name__)
    if "\0" in content:
        return Skipped(name, "binary")
    if not content or content.isspace():
        return Skipped(name, "empty")
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return Skipped(name, "not valid Unicode")
    return Document(name, content)


def record_document(name: str, record: object, options: ReadOptions) -> Document | Skipped:
    """A record's document: its text field, or its ``messages`` as the chat template writes them."""
    field_name = options.text_field
    if not isinstance(record, dict):
        return Skipped(name, f"no field {field_name!r}", detail=f"is {type(record).__name__}")
    value: object = record
    for key in [field_name] if field_name in record else field_name.split("."):
        value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
    if (value is None or value is _ABSENT) and record.get("messages"):
        value = record["messages"]
    if value is _ABSENT:
        return Skipped(name, f"no field {field_name!r}", detail=f"has {', '.join(map(str, record))[:80]}")
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return _conversation(name, value, options)
    return document(name, value)


def _conversation(name: str, messages: list[dict[str, Any]], options: ReadOptions) -> Document | Skipped:
    if options.chat_text is None:
        return Skipped(name, "messages without a chat template", detail="give a --tokenizer that has one")
    try:
        # Tables give every message all fields, and null where it has none.
        messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
        text = options.chat_text(messages)
    except Exception as error:  # a template is a program of its own, and raises what it likes
        return Skipped(name, "not taken by the chat template", detail=first_line(error)[:80])
    found = document(name, text)
    if not isinstance(found, Document):
        return found
    return Document(name, text, is_chat=True, messages=json.dumps(messages, default=str))


def parts(name: str, pieces: Iterable[str], *, is_chat: bool = False) -> Iterator[Document | Skipped]:
    """The document that pieces of text make up; one longer than ``LONGEST`` in parts."""
    texts = _cut(pieces)
    first, second = next(texts, ""), next(texts, None)
    if second is None:
        found = document(name, first)
        yield Document(name, first, is_chat=is_chat) if isinstance(found, Document) else found
        return
    for number, text in enumerate(chain([first, second], texts), start=1):
        found = document(f"{name}#{number}", text)
        yield Document(found.name, text, number, is_chat) if isinstance(found, Document) else found


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    """Parts of at most ``LONGEST`` characters, that end with a line if the second half of one has
    a line's end, else before a space, else anywhere.
    """
    text, half = "", LONGEST // 2
    for piece in pieces:
        text += piece
        while len(text) > LONGEST:
            place = text.rfind("\n", half, LONGEST) + 1 or max(text.rfind(" ", half, LONGEST), 0) or LONGEST
            yield text[:place]
            text = text[place:]
    if text:
        yield text


@dataclass
class Tally:
    """Counts documents by reason, and keeps the first names."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    """Of the first of each reason, where there is one."""

    def add(self, name: str, reason: str, detail: str = "") -> None:
        """Note one more."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(name)
        if detail:
            self.details.setdefault(reason, detail)

    def summary(self) -> str:
        """One line for people, such as "2 empty (a.txt, b.txt); 1 binary (c.txt)"."""
        return "; ".join(self._lines("{:,} {}".format))

    def lines(self) -> list[str]:
        """A line for each reason, which is a noun in the singular with what follows it."""
        return self._lines(counted)

    def _lines(self, with_number: Callable[[int, str], str]) -> list[str]:
        """Counts by reason, each with its first names."""
        lines = []
        for reason, count in self.counts.most_common():
            more = ", ..." if count > _NAMES_SHOWN else ""
            detail = f": {self.details[reason]}" if reason in self.details else ""
            lines.append(f"{with_number(count, reason)} ({', '.join(self.names[reason][:_NAMES_SHOWN])}{more}{detail})")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """What ``data.json`` holds."""
        reasons = {reason: {"count": count, "names": self.names[reason]} for reason, count in self.counts.most_common()}
        return {"count": self.counts.total(), "reasons": reasons}
