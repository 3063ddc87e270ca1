"""The study's text: prepared where it is missing, and what the models have to know of it."""

import subprocess
import sys
from pathlib import Path

from motifarch.data.manifest import FILE_NAME, DataShape, Manifest
from motifarch.errors import UserError
from motifarch.study.grid import StudyData


def ensure_data(data: StudyData, *, dry_run: bool = False) -> Manifest | None:
    """Opens the prepared folder, made first where it is missing and the grid names a source.

    Returns:
        None in a dry run without such a folder, which makes none.

    Raises:
        UserError: it is missing and has no source, or was prepared with another sequence length.
        KeyboardInterrupt: the preparation was interrupted.
    """
    if not (Path(data.path) / FILE_NAME).is_file():
        if dry_run:
            return None
        if data.source:
            _prepare(data)
    manifest = Manifest.read(Path(data.path))
    if manifest.seq_len != data.seq_len:
        raise UserError(
            f"data.seq_len is {data.seq_len}, but {data.path} was prepared with sequences of {manifest.seq_len} "
            f"tokens; give --data.seq_len {manifest.seq_len}, or another data.path"
        )
    return manifest


def _prepare(data: StudyData) -> None:
    """In a process of its own: forking a pool is safe only where nothing else has run."""
    argv = [text for source in data.source for text in ("--source", source)]
    for name in ("seq_len", "tokenizer", "vocab_size", "validation_fraction", "max_documents"):
        if (value := getattr(data, name)) is not None:
            argv += [f"--{name.replace('_', '-')}", str(value)]
    command = [sys.executable, "-m", "motifarch.data.prepare", *argv, "--output", data.path]
    done = subprocess.run(command, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError(f"data.source {', '.join(data.source)} could not be prepared: the reason stands above")


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
