"""``data.json``: what a prepared folder is, where it came from and what was left out."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from motifarch.errors import UserError

FILE_NAME = "data.json"
FORMAT = "motifarch packed data"
FORMAT_VERSION = 1


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
    """Sizes of one split. Tokens count each document's end-of-text token."""

    documents: int
    tokens: int
    blocks: int
    dropped_tokens: int
    """Tokens of the last, partial block, which is left out."""


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
    notes: list[str]
    """What else to know of the text and its tokens."""

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
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise UserError(f"{path} is not a record of prepared data: {remedy}")
            version = content.get("format_version")
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format version {version}, this motifarch reads version {FORMAT_VERSION}: "
                    "prepare the data again with this version"
                )
            content.setdefault("notes", [])  # which earlier versions did not write
            values = {field.name: content[field.name] for field in fields(cls)}
            values["splits"] = {name: SplitCounts(**counts) for name, counts in values["splits"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): prepare the data again with --overwrite") from None
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Write ``data.json`` into ``folder``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
