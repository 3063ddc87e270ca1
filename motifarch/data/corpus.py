"""A preparation's documents: read onto disk, split into training and validation."""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from motifarch.data.arrow_files import gather, write_tables
from motifarch.data.documents import (
    LONGEST,
    Document,
    Filtered,
    Found,
    Noticed,
    ReadOptions,
    Skipped,
    Tally,
    parts,
    printable,
)
from motifarch.data.mapped_pages import MappedPages
from motifarch.data.permutation import Permutation
from motifarch.data.settings import PrepareSettings
from motifarch.data.sources import Source
from motifarch.errors import UserError
from motifarch.progress import Advance, progress

_HASH_RANGE = 2**64
# In random order each document maps its neighbours too, some hundred kilobytes.
_READ_AT_ONCE = 256
# Conjoining letters of a Korean syllable: the first consonant, then the vowel.
_JAMO = re.compile("[\u1100-\u115f\ua960-\ua97c][\u1160-\u11a7]")

Filter = Callable[[Iterable[Found]], Iterator[Found]]
"""Passes on what it is given, of some documents that they are left out."""

_Row = tuple[str, str, bool, str, int]
"""name, text, is_chat, messages, split_hash"""


@dataclass(frozen=True)
class Corpus:
    """The documents, read."""

    rows: datasets.Dataset
    """name, text, is_chat, messages (JSON; empty where no loss mask is made), split_hash"""
    content_hash: str
    last_validation_hash: int
    """Documents with a split_hash up to this one are for validation."""
    longest: int
    """Characters of the longest document."""
    by_source: list[int]
    """Number of rows of each source; they follow each other."""

    def split_of(self, split_hash: int) -> str:
        """The split that a document belongs to."""
        return "validation" if split_hash <= self.last_validation_hash else "train"

    def training_texts(self, seed: int) -> Iterator[str]:
        """The training documents, in the seed's order."""
        for text, split_hash in shuffled(self.rows, seed, "text"):
            if self.split_of(split_hash) == "train":
                yield text.as_py()


def read_corpus(
    scratch: Path,
    settings: PrepareSettings,
    sources: list[Source],
    *,
    skipped: Tally,
    noticed: Tally,
    filtered: Tally | None = None,
    options: ReadOptions | None = None,
    composes: bool = False,
    filters: Sequence[Filter] = (),
) -> Corpus:
    """Write all documents to disk, and choose the border between training and validation.

    A document is placed by a hash of its text and the seed, so that it keeps its place when others
    come or go, and copies of a text are never on both sides. Few documents may all fall on one
    side: then the one next to the border moves. The end of a lone document is for validation.

    ``composes`` says whether the tokenizer will compose what is decomposed.

    Of a shard, all documents are read and filtered, so that the border between training and
    validation is that of all, and those are kept whose text belongs to it; what is left out belongs
    to a shard by its name.

    What holds no text is added to ``skipped``, what ``filters`` leave out to ``filtered``, what
    else should be known to ``noticed``.

    Raises:
        UserError: there is no text, or none to divide; with ``strict``, something is left out.
    """
    filtered = Tally() if filtered is None else filtered
    content = hashlib.sha256()
    low, high = _HASH_RANGE, -1
    longest = 0
    by_source = [0] * len(sources)
    shard, shards = settings.shard_of

    def mine(text: str) -> bool:
        """Whether what this text says or names belongs to the shard."""
        return shards == 1 or zlib.crc32(text.encode()) % shards == shard - 1

    def accept(advance: Advance) -> Iterator[_Row]:
        nonlocal low, high, longest
        for number, source in enumerate(sources):
            accepted = 0
            documents = source.documents(options or ReadOptions(settings.field))
            stream = _of_bounded_length(documents, settings.messages)
            for one_filter in filters:
                stream = one_filter(stream)
            for found in stream:
                if isinstance(found, Filtered):
                    if mine(found.name):
                        filtered.add(found.name, found.reason, found.detail)
                    continue
                if isinstance(found, Noticed):
                    if mine(found.name):
                        noticed.add(found.name, found.what)
                    continue
                if isinstance(found, Skipped):
                    if settings.strict:
                        raise UserError(
                            f"--strict: {found.name} is skipped ({found.reason}): remove it from the sources, "
                            "or leave --strict out"
                        )
                    if mine(found.name):
                        skipped.add(found.name, found.reason, found.detail)
                    continue
                encoded = found.text.encode()
                digest = hashlib.blake2b(encoded, digest_size=8, key=str(settings.seed).encode()).digest()
                split_hash = int.from_bytes(digest, "little")
                low, high = min(low, split_hash), max(high, split_hash)
                if mine(found.text):
                    content.update(hashlib.sha256(encoded).digest())
                    for what in _oddities(found, composes):
                        noticed.add(found.name, what)
                    longest = max(longest, len(found.text))
                    messages = found.messages if settings.messages else ""
                    yield found.name, found.text, found.is_chat, messages, split_hash
                    by_source[number] += 1
                    advance()
                accepted += 1
                if accepted == settings.max_documents:
                    break

    with progress("reading") as advance:
        rows = _write(scratch / "documents.arrow", accept(advance))
    if shards > 1 and (not len(rows) or low == high):
        raise UserError(f"--shard {settings.shard}: no document is left for it: give fewer shards, or more text")
    if not len(rows):
        tallies = {"skipped": skipped, "filtered": filtered}
        reasons = "".join(f"; {fate}: {tally.summary()}" for fate, tally in tallies.items() if tally.counts)
        names = ", ".join(map(printable, settings.sources))
        raise UserError(f"no document is left of {names}{reasons}: give sources that hold text")
    if low < high:
        border = min(max(int(settings.validation_fraction * _HASH_RANGE), low), high - 1)
        return Corpus(rows, content.hexdigest(), border, longest, by_source)
    if len(rows) > 1:
        raise UserError(
            f"all {len(rows)} documents hold the same text, and training and validation need one each: give others"
        )
    if settings.messages:
        raise UserError(
            f"there is one conversation, {rows[0]['name']}, and training and validation need one each: give more"
        )
    name, text, is_chat = (rows[0][column] for column in ("name", "text", "is_chat"))
    begin, end = _divide(text, settings.validation_fraction)
    if not begin.strip() or not end.strip():
        raise UserError(
            f"there is one document, {name}, too short to keep its end for validation: give more text, or another "
            "--validation-fraction"
        )
    share = f"the last {len(end):,} of {len(text):,} characters"
    noticed.add(name, "only document, whose end is for validation", share)
    divided: list[_Row] = [(name, begin, is_chat, "", 1), (name, end, is_chat, "", 0)]
    return Corpus(
        _write(scratch / "divided.arrow", divided),
        content.hexdigest(),
        0,
        longest,
        [2 * number for number in by_source],
    )


def _of_bounded_length(found: Iterable[Found], messages: bool) -> Iterator[Found]:
    """Cut records that are too long, as readers cut files; of ``messages`` none can be cut, and all
    else is left out.
    """
    for one in found:
        if messages and isinstance(one, Document):
            if not one.is_chat:
                one = Skipped(one.name, "no conversation", detail="give records with messages")
            elif len(one.text) > LONGEST:
                one = Skipped(one.name, f"longer than {LONGEST:,} characters")
        pieces: Iterable[Found] = [one]
        if isinstance(one, Document) and len(one.text) > LONGEST:
            pieces = parts(one.name, [one.text], is_chat=one.is_chat)
        for piece in pieces:
            if isinstance(piece, Document) and piece.part == 1:
                yield Noticed(piece.name, f"document longer than {LONGEST:,} characters, cut into several")
            yield piece


def _oddities(found: Document, composes: bool) -> Iterator[str]:
    """What a text may have got on its way here."""
    text = found.text
    if "\r\n" in text:
        yield "document with Windows line ends, kept"
    if text.isascii():
        return
    if "\ufffd" in text:
        yield "document with replacement characters (U+FFFD), left by a wrong decoding"
    if not unicodedata.is_normalized("NFC", text):
        what = "decomposed Hangul (NFD, as of macOS)" if _JAMO.search(text) else "decomposed characters (not NFC)"
        fate = "kept: such tokens are not those of composed text, which prompts usually are"
        yield f"document with {what}, {'composed by the tokenizer (NFC)' if composes else fate}"


def _divide(text: str, fraction: float) -> tuple[str, str]:
    """Cut off a fraction at a text's end, if possible where a line begins, or a word."""
    wanted = len(text) - round(len(text) * fraction)
    nearby = max(1, 2 * wanted - len(text))
    place = text.rfind("\n", nearby, wanted) + 1 or text.rfind(" ", nearby, wanted) + 1 or wanted
    return text[:place], text[place:]


def _write(path: Path, documents: Iterable[_Row]) -> datasets.Dataset:
    kinds = {"name": "string", "text": "large_string", "is_chat": "bool", "messages": "large_string"}
    kinds |= {"split_hash": "uint64"}
    features = datasets.Features({column: datasets.Value(kind) for column, kind in kinds.items()})
    return write_tables(path, _document_tables(documents), features)


def _document_tables(documents: Iterable[_Row]) -> Iterator[pa.Table]:
    # Each document counts for some characters more than it has: of small ones a table holds 1024.
    for gathered in gather(documents, lambda document: len(document[1]) + 2**14, 2**24):
        names, texts, chats, messages, hashes = zip(*gathered, strict=True)
        yield pa.table(
            {
                "name": pa.array(names),
                "text": pa.array(texts, pa.large_string()),
                "is_chat": pa.array(chats),
                "messages": pa.array(messages, pa.large_string()),
                "split_hash": pa.array(hashes, pa.uint64()),
            }
        )


def shuffled(rows: datasets.Dataset, seed: int, column: str) -> Iterator[tuple[pa.Scalar, int]]:
    """A column's values with their split hashes, in the seed's document order."""
    order, pages = Permutation(len(rows), seed, "documents"), MappedPages(rows.data.table)
    for begin in range(0, len(rows), _READ_AT_ONCE):
        for index in order(np.arange(begin, min(begin + _READ_AT_ONCE, len(rows)))).tolist():
            row = rows.data.fast_slice(index, 1)
            yield row.column(column)[0], row.column("split_hash")[0].as_py()
        pages.give_back()
