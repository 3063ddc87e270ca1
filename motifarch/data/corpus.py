"""A preparation's documents: read onto disk, split into training and validation."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from motifarch.data.arrow_files import gather, write_tables
from motifarch.data.documents import SkipLog, Skipped
from motifarch.data.permutation import Permutation
from motifarch.data.progress import bar
from motifarch.data.settings import PrepareSettings
from motifarch.data.sources import Source
from motifarch.errors import UserError

_HASH_RANGE = 2**64


@dataclass(frozen=True)
class Corpus:
    """The documents, read."""

    rows: datasets.Dataset
    """text, split_hash"""
    content_hash: str
    last_validation_hash: int
    """Documents with a split_hash up to this one are for validation."""

    def split_of(self, split_hash: int) -> str:
        """The split that a document belongs to."""
        return "validation" if split_hash <= self.last_validation_hash else "train"

    def training_texts(self, seed: int) -> Iterator[str]:
        """The training documents, in the seed's order."""
        for text, split_hash in shuffled(self.rows, seed, "text"):
            if self.split_of(split_hash) == "train":
                yield text.as_py()


def read_corpus(scratch: Path, settings: PrepareSettings, sources: list[Source], skipped: SkipLog) -> Corpus:
    """Write all documents to disk, and choose the border between training and validation.

    A document is placed by a hash of its text and the seed, so that it keeps its place when others
    come or go, and copies of a text are never on both sides. Few documents may all fall on one
    side: then the one next to the border moves.
    """
    content = hashlib.sha256()
    low, high = _HASH_RANGE, -1

    def accept() -> Iterator[tuple[str, int]]:
        nonlocal low, high
        for source in sources:
            accepted = 0
            for found in source.documents():
                if isinstance(found, Skipped):
                    if settings.strict:
                        raise UserError(
                            f"--strict: {found.name} is skipped ({found.reason}): remove it from the sources, "
                            "or leave --strict out"
                        )
                    skipped.add(found)
                    continue
                encoded = found.text.encode()
                content.update(hashlib.sha256(encoded).digest())
                digest = hashlib.blake2b(encoded, digest_size=8, key=str(settings.seed).encode()).digest()
                split_hash = int.from_bytes(digest, "little")
                low, high = min(low, split_hash), max(high, split_hash)
                yield found.text, split_hash
                accepted += 1
                if accepted == settings.max_documents:
                    break

    features = datasets.Features({"text": datasets.Value("large_string"), "split_hash": datasets.Value("uint64")})
    rows = write_tables(scratch / "documents.arrow", _document_tables(bar(accept(), "reading")), features)
    if not len(rows):
        reasons = f"; skipped: {skipped.summary()}" if skipped.counts else ""
        raise UserError(f"no document is left of {', '.join(settings.sources)}{reasons}: give sources that hold text")
    if low == high:
        count = "there is one document" if len(rows) == 1 else f"all {len(rows)} documents hold the same text"
        raise UserError(f"{count}, and training and validation need one each: give more, or smaller documents")
    border = min(max(int(settings.validation_fraction * _HASH_RANGE), low), high - 1)
    return Corpus(rows, content.hexdigest(), border)


def _document_tables(documents: Iterable[tuple[str, int]]) -> Iterator[pa.Table]:
    # Each document counts for some characters more than it has: of small ones a table holds 1024.
    for gathered in gather(documents, lambda document: len(document[0]) + 2**14, 2**24):
        texts, hashes = zip(*gathered, strict=True)
        yield pa.table({"text": pa.array(texts, pa.large_string()), "split_hash": pa.array(hashes, pa.uint64())})


def shuffled(rows: datasets.Dataset, seed: int, column: str) -> Iterator[tuple[pa.Scalar, int]]:
    """A column's values with their split hashes, in the seed's document order."""
    order = Permutation(len(rows), seed, "documents")
    for begin in range(0, len(rows), 10_000):
        for index in order(np.arange(begin, min(begin + 10_000, len(rows)))).tolist():
            row = rows.data.fast_slice(index, 1)
            yield row.column(column)[0], row.column("split_hash")[0].as_py()
