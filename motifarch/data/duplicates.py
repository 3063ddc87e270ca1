"""Documents that are there already, the same or nearly: the first is kept."""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from motifarch.data.documents import Document, Filtered, Found
from motifarch.errors import UserError

_SHINGLE = 8
"""Characters of a shingle: some words of Korean, one or two of English."""
_FUNCTIONS = 128
_AT_ONCE = 2**15
"""Shingles hashed at once, which take some times 16 MB, however long a document is."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class ExactDuplicates:
    """Leaves out documents whose text was there before. Each kept one takes some 100 bytes."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, found: Iterable[Found]) -> Iterator[Found]:
        """The same, without them."""
        for one in found:
            if isinstance(one, Document):
                digest = hashlib.blake2b(one.text.encode(), digest_size=16).digest()
                if digest in self._seen:
                    yield Filtered(one.name, "duplicate")
                    continue
                self._seen.add(digest)
            yield one


class NearDuplicates:
    """Leaves out documents of which an earlier, kept one has nearly all shingles.

    A shingle is each 8 characters in a row of the text in NFC with single spaces: characters, not
    words, since Korean writes many forms of a word. The share of shingles that two documents have
    in common, of those that either has (Jaccard), is estimated by MinHash with 128 functions, to
    about 0.04, for those that locality-sensitive hashing finds (Leskovec, Rajaraman and Ullman,
    Mining of Massive Datasets, chapter 3; Lee et al., arXiv 2107.06499). The order of documents
    decides which is kept; nothing is random. Each kept document takes about 4 kB of memory.

    Args:
        threshold: share of common shingles from which on a document is left out.

    Raises:
        UserError: datasketch is not installed.
    """

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHashLSH
        except ImportError:
            raise UserError(
                '--deduplicate minhash needs datasketch: pip install "motifarch[data]", or take --deduplicate exact'
            ) from None
        self._threshold = threshold
        # Estimates sort out what is found wrongly; what is not found is lost.
        self._index = MinHashLSH(min(threshold, 0.95), _FUNCTIONS, weights=(0.1, 0.9), hashfunc=_short)
        self._names: list[str] = []
        self._signatures = np.empty((1024, _FUNCTIONS), np.uint32)

    def __call__(self, found: Iterable[Found]) -> Iterator[Found]:
        """The same, without them."""
        for one in found:
            if isinstance(one, Document) and (earlier := self._earlier(one)) is not None:
                yield Filtered(one.name, "near duplicate", detail=f"of {earlier}")
            else:
                yield one

    def _earlier(self, document: Document) -> str | None:
        """The first document that is nearly the same; without one this is kept in mind."""
        signature = _signature(document.text)
        near = np.array(sorted(self._index.query(signature)), dtype=np.int64)
        alike = (self._signatures[near] == signature.hashvalues).mean(axis=1) >= self._threshold
        if alike.any():
            return self._names[near[alike.argmax()]]
        number = len(self._names)
        if number == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[number] = signature.hashvalues
        self._index.insert(number, signature)
        self._names.append(document.name)
        return None


def _short(band: bytes) -> bytes:
    return hashlib.blake2b(band, digest_size=8).digest()


def _signature(text: str) -> Any:
    """The MinHash of a text's shingles."""
    from datasketch import MinHash

    signature = MinHash(_FUNCTIONS, seed=1, scheme="affine32", hashfunc=int)
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    hashes = np.unique(_shingle_hashes(plain))
    for begin in range(0, len(hashes), _AT_ONCE):
        signature.update_batch(hashes[begin : begin + _AT_ONCE].tolist())
    return signature


def _shingle_hashes(text: str) -> np.ndarray:
    """A number of 32 bits (uint64 [shingles]) for each shingle; a text below one has itself."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    width = min(_SHINGLE, len(codes))
    windows = len(codes) - width + 1
    hashes = np.zeros(windows, np.uint64)
    for place in range(width):  # all windows at once
        hashes = (hashes ^ codes[place : place + windows]) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes >> np.uint64(32)
