"""The study's text: prepared where it is missing, and what the models have to know of it."""

import subprocess
import sys
from pathlib import Path

from motifarch.data.manifest import FILE_NAME, DataShape, Manifest
from motifarch.errors import UserError
from motifarch.study.grid import StudyData


def ensure_data(data: StudyData) -> Manifest:
    """Opens the prepared folder, made first where it is missing and the grid names a source.

    Raises:
        UserError: it is missing and has no source, or was prepared with another sequence length.
        KeyboardInterrupt: the preparation was interrupted.
    """
    if not _is_there(data) and data.source:
        options = {
            "seq-len": data.seq_len,
            "tokenizer": data.tokenizer,
            "vocab-size": data.vocab_size,
            "validation-fraction": data.validation_fraction,
            "max-documents": data.max_documents,
            "output": data.path,
        }
        argv = [text for source in data.source for text in ("--source", source)]
        argv += [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
        # A process of its own, as all that a study runs: forking a pool is safe only where nothing
        # else has run.
        done = subprocess.run([sys.executable, "-m", "motifarch.data.prepare", *argv], check=False)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise UserError(f"data.source {', '.join(data.source)} could not be prepared: the reason stands above")
    manifest = Manifest.read(Path(data.path))
    if manifest.seq_len != data.seq_len:
        raise UserError(
            f"data.seq_len is {data.seq_len}, but {data.path} was prepared with sequences of {manifest.seq_len} "
            f"tokens; give --data.seq_len {manifest.seq_len}, or another data.path"
        )
    return manifest


def describe(data: StudyData, manifest: Manifest | None) -> DataShape:
    """Length and vocabulary of the sequences.

    Args:
        data: the grid's.
        manifest: the prepared folder's; None for data that is still to be prepared.

    Raises:
        UserError: the vocabulary is not known before the data is there.
    """
    if manifest is not None:
        return manifest.shape(data.path)
    if data.tokenizer is not None or not data.source:
        raise UserError(f"data.path is {data.path}, which is not prepared: how large its vocabulary is can't be said")
    return DataShape(data.seq_len, data.vocab_size, 0, data.path)


def look(data: StudyData) -> Manifest | None:
    """The prepared folder's manifest, if it is there; nothing is prepared."""
    return ensure_data(data) if _is_there(data) else None


def _is_there(data: StudyData) -> bool:
    return (Path(data.path) / FILE_NAME).is_file()
