"""``data.json``: what a prepared folder is, where it came from and what was left out."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from motifarch.errors import UserError, first_line
from motifarch.files import read_json, read_sealed_json, write_sealed_json

FILE_NAME = "data.json"
FORMAT = "motifarch packed data"
FORMAT_VERSION = 2
"""Of what is written. Version 1, whose rows and record had no checksums, is read too."""
MASKED_VERSION = 3
"""Of data with a loss mask, which a reader of version 2 must not take for tokens."""


@dataclass(frozen=True)
class DataShape:
    """What a model has to know of its data, prepared or not."""

    seq_len: int
    """Tokens of a sequence."""
    vocab_size: int
    """Token ids are smaller than this."""
    eos_token_id: int
    folder: str
    """Where the data is, for messages."""


@dataclass
class SplitCounts:
    """Sizes of one split. Tokens count each document's end-of-text token, but no padding."""

    documents: int
    tokens: int
    blocks: int
    dropped_tokens: int
    """Tokens of the last, partial block, which is left out, or of conversations past its length."""
    bytes: int | None = None
    """UTF-8 bytes of the documents' text; None in data prepared before it was counted, or with a
    loss mask.
    """
    trained_tokens: int | None = None
    """Targets that the loss mask leaves; None without one."""
    padding_tokens: int = 0
    """What fills blocks of whole conversations up."""
    rows_root: str | None = None
    """The Merkle root over the rows (`motifarch.data.row_tree`); None in older data."""

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text for each token, the documents' own tokens of beginning and end included."""
        return self.bytes / self.tokens if self.bytes and self.tokens else None


@dataclass
class Manifest:
    """The content of ``data.json``."""

    seq_len: int
    """Targets in a block; a stored row has one token more."""
    vocab_size: int
    """Token ids are smaller than this."""
    eos_token_id: int
    fingerprint: str
    """Hash of the documents' text and of everything else that decides the blocks' contents."""
    tokenizer_fingerprint: str
    """Hash of what the tokenizer does, wherever it came from."""
    splits: dict[str, SplitCounts]
    settings: dict[str, Any]
    """The options that decide the contents, as given."""
    inputs: list[dict[str, Any]]
    """Name and state of each source and tokenizer folder, to see changes cheaply."""
    skipped: dict[str, Any]
    """How many documents were left out, by reason, with the names of the first ones."""
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """What else to know of the text and its tokens."""
    checksums: bool = True
    """Whether each row carries a checksum."""
    loss_mask: bool = False
    """Whether tokens are stored with one (see `motifarch.data.loss_mask`)."""
    filtered: dict[str, Any] = field(default_factory=dict)
    """How many documents options left out, such as duplicates, as in ``skipped``."""
    lengths: list[dict[str, Any]] = field(default_factory=list)
    """For each source its documents, their lengths in tokens, and bytes a token."""
    truncated: dict[str, Any] = field(default_factory=dict)
    """How many conversations were cut to a block's length, with the names of the first ones."""

    def shape(self, folder: str | Path) -> DataShape:
        """What a model has to know of the data in a folder."""
        return DataShape(self.seq_len, self.vocab_size, self.eos_token_id, str(folder))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a prepared folder's ``data.json``.

        Raises:
            UserError: if the folder or the file is missing, damaged or of another format version.
        """
        path = folder / FILE_NAME
        remedy = "prepare one with `motifarch data prepare --source ... --output DIR`"
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist: check the path, or {remedy}")
        if not path.is_file():
            raise UserError(f"{folder} is not a prepared data folder (it has no {FILE_NAME}): {remedy}")
        try:
            version = _version(read_json(path))
            if version is None:
                raise UserError(f"{path} is not a record of prepared data: {remedy}")
            if version not in (1, FORMAT_VERSION, MASKED_VERSION):
                raise UserError(
                    f"{path} has format version {version}, this motifarch reads versions 1 to {MASKED_VERSION}: "
                    "prepare the data again with this version"
                )
            content = read_sealed_json(path, unsealed=("format_version", 1))
            manifest = _READER.validate_json(json.dumps({"checksums": version > 1} | content), strict=True)
            if manifest.loss_mask != (version == MASKED_VERSION):
                raise ValueError(f"loss_mask is {manifest.loss_mask} in version {version}")
            if manifest.seq_len < 1 or not 0 <= manifest.eos_token_id < manifest.vocab_size:
                raise ValueError("seq_len, vocab_size or eos_token_id is out of range")
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}): copy it anew, or prepare the data again with --overwrite"
            ) from None
        return manifest

    def write(self, folder: Path) -> None:
        """Write ``data.json`` into ``folder``, with a hash of its own content."""
        version = MASKED_VERSION if self.loss_mask else FORMAT_VERSION
        write_sealed_json(folder / FILE_NAME, {"format": FORMAT, "format_version": version, **asdict(self)})


_READER = TypeAdapter(Manifest)


def _version(content: Any) -> int | None:
    """The format version of a record of prepared data; None for anything else."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    version = content.get("format_version")
    return version if type(version) is int else None
