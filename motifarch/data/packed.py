"""Prepared data, opened: blocks of packed documents, checked as they are read."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from motifarch.data.block_files import BlockFiles
from motifarch.data.loss_mask import split_mask
from motifarch.data.manifest import Manifest
from motifarch.errors import UserError, first_line

_T = TypeVar("_T")
_REMEDY = "copy it anew, or prepare the data again with --overwrite"


class Block(NamedTuple):
    """One row of a prepared dataset."""

    input_ids: np.ndarray
    """int32 [seq_len + 1]; a block's last token is the next one's first."""
    doc_lengths: np.ndarray
    """int32 [documents], summing to seq_len + 1; a document cut by the border counts twice."""
    loss_mask: np.ndarray | None = None
    """bool [seq_len + 1], whether each token is trained where it is a target; None: all are."""


def block_checksum(index: int, input_ids: bytes, doc_lengths: bytes) -> int:
    """The CRC-32 that a row carries, of its number in the split and of its little-endian int32."""
    return zlib.crc32(doc_lengths, zlib.crc32(input_ids, index))


class PackedDataset:
    """One split ("train" or "validation") of a folder made by ``motifarch data prepare``.

    A sequence of :class:`Block`, with the attributes of the folder's `Manifest`. A block is read
    from its file and compared with its checksum each time: no byte that has changed is trained on.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest, rows: BlockFiles) -> None:
        self.folder = folder
        self.split = split
        self.seq_len = manifest.seq_len
        self.vocab_size = manifest.vocab_size
        self.eos_token_id = manifest.eos_token_id
        self.shape = manifest.shape(folder)
        self.has_loss_mask = manifest.loss_mask
        self.fingerprint = manifest.fingerprint
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self.bytes_per_token = manifest.splits[split].bytes_per_token
        self.rows_root = manifest.splits[split].rows_root
        self._rows = rows

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "PackedDataset":
        """Open a split without reading its tokens.

        Raises:
            UserError: if the folder is missing, not a prepared one, damaged, or has no such split.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if split not in manifest.splits:
            raise UserError(f"{folder} has no split {split!r}: take one of {', '.join(manifest.splits)}")
        try:
            files = sorted((folder / split).glob("data-*.arrow"))
            rows = BlockFiles(files, manifest.seq_len, checksums=manifest.checksums)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = f"{folder / split} is damaged ({first_line(error)})"
            raise UserError(f"{reason}: copy it anew, or prepare the data again with --overwrite") from None
        expected = manifest.splits[split].blocks
        if len(rows) != expected:
            raise UserError(
                f"{folder / split} is damaged: it holds {len(rows)} rows, its record says {expected}: copy it anew, or "
                "prepare the data again with --overwrite"
            )
        return cls(folder, split, manifest, rows)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Block:
        """Read one block.

        Raises:
            IndexError: if ``index`` lies outside ``range(len(self))``.
            UserError: a damaged row: a token id outside the vocabulary, lengths that don't add up.
        """
        row = self._read(self._rows.read, index)
        where = self._where(index)
        if row.checksum is not None and row.checksum != block_checksum(index, row.input_ids, row.doc_lengths):
            raise UserError(f"{where} has changed since it was prepared (its checksum differs): {_REMEDY}")
        block = Block(np.frombuffer(row.input_ids, dtype="<i4"), self._lengths(index, row.doc_lengths))
        if self.has_loss_mask:
            input_ids, loss_mask = split_mask(block.input_ids)
            block = Block(input_ids, block.doc_lengths, loss_mask)
        if block.input_ids.min() < 0 or block.input_ids.max() >= self.vocab_size:
            wrong = block.input_ids[(block.input_ids < 0) | (block.input_ids >= self.vocab_size)][0]
            raise UserError(f"{where} holds token id {wrong}, outside the vocabulary of {self.vocab_size}: {_REMEDY}")
        return block

    def document_lengths(self, index: int) -> np.ndarray:
        """Read the `Block.doc_lengths` of one block without its tokens and its checksum.

        Raises:
            IndexError: as the block itself.
            UserError: they can't be read, or don't add up.
        """
        return self._lengths(index, self._read(self._rows.read_lengths, index))

    def _read(self, read: Callable[[int], _T], index: int) -> _T:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.folder / self.split}")
        try:
            return read(index)
        except OSError as error:
            raise UserError(f"{self._where(index)} can't be read ({error.strerror or error}): {_REMEDY}") from None

    def _lengths(self, index: int, content: bytes) -> np.ndarray:
        lengths = np.frombuffer(content, dtype="<i4")
        if lengths.size == 0 or lengths.min() < 1 or lengths.sum() != self.seq_len + 1:
            raise UserError(
                f"{self._where(index)} holds documents of {lengths.sum()} tokens in all, expected "
                f"{self.seq_len + 1}: {_REMEDY}"
            )
        return lengths

    def _where(self, index: int) -> str:
        return f"row {index} of {self.folder / self.split}"


def check_same_seq_len(datasets: Sequence[PackedDataset]) -> None:
    """Check that the blocks of all datasets fit into one batch.

    Raises:
        UserError: naming two folders whose blocks differ in length.
    """
    for other in datasets[1:]:
        first = datasets[0]
        if other.seq_len != first.seq_len:
            raise UserError(
                f"{first.folder} and {other.folder} were prepared with different --seq-len ({first.seq_len} and "
                f"{other.seq_len}): prepare one of them again with the other's"
            )


def check_same_tokenizer(datasets: Sequence[PackedDataset]) -> None:
    """Check that token ids mean the same in all datasets.

    Raises:
        UserError: naming two folders that were prepared with different tokenizers.
    """
    for other in datasets[1:]:
        first = datasets[0]
        if other.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(
                f"{first.folder} and {other.folder} were prepared with different tokenizers "
                f"({first.tokenizer_fingerprint[:12]} and {other.tokenizer_fingerprint[:12]}): prepare one of them "
                f"again with the other's, for example --tokenizer {first.folder / 'tokenizer'}"
            )
