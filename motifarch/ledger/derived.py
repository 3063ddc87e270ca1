"""Folders that are made of others: averages, exports, grown and patched models. Each takes along
the ledger of what it was made of, and adds an entry of its own, so that what came from outside
stays named however often it is changed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from motifarch.ledger.chain import Entry, Ledger, make_entry
from motifarch.ledger.made_with import environment
from motifarch.ledger.tensor_hash import state_root, whole_hash


def files_root(folder: Path) -> str:
    """The Merkle root over the tensors of a model folder's safetensors files, read one at a time.

    Raises:
        ValueError: the folder holds none, or a name twice: which one counts would be the reader's
            choice.
        SafetensorError: a file is damaged.
    """
    hashes: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                if name in hashes:
                    raise ValueError(f"{folder} holds {name} twice")
                hashes[name] = whole_hash(tensors.get_tensor(name))
    if not hashes:
        raise ValueError(f"{folder} holds no safetensors files")
    return state_root(hashes).hex()


def source_of(folder: Path) -> tuple[Ledger, Entry | None]:
    """A model folder's ledger, and the entry of the weights that lie there; None where there is no
    ledger, or the weights are others.
    """
    ledger = Ledger.read(folder)
    if not ledger.entries:
        return ledger, None
    try:
        same = ledger.entries[-1].link["weights"] == files_root(folder)
    except (ValueError, OSError, SafetensorError):  # no weights that could be those
        same = False
    return ledger, ledger.entries[-1] if same else None


def derived_link(
    ledger: Ledger, kind: str, parent: Entry | None, source: Path, weights: Mapping[str, str], **about: Any
) -> dict[str, Any]:
    """What a folder that was made of another stands on. What was trained between a patch and the
    save of the patched model is not in it.

    Args:
        ledger: the one that it goes into.
        kind: what was done: "average", "export", "growth" or "patch".
        parent: the entry of what it was made of.
        source: what that was, which is named as from outside if it has no entry.
        weights: the roots over what was made.
        about: what was done, further.
    """
    return {
        "parent": parent.hash if parent else None,
        "kind": kind,
        **weights,
        "origin": None if parent else {"outside": source.resolve().name},
        "environment": ledger.keep(environment({})),
        **about,
    }


def note_derived(folder: Path, kind: str, source: Path, given: tuple[Ledger, Entry | None], **about: Any) -> Entry:
    """Gives a new model folder its ledger.

    Args:
        folder: with its safetensors files.
        kind: as of `derived_link`, and so are the others.
        source: what it was made of.
        given: the ledger there, and the entry.
        about: what was done, further.
    """
    other, parent = given
    ledger = Ledger.read(folder)
    if parent is not None:
        ledger.take_over(other, parent)
    link = derived_link(ledger, kind, parent, source, {"weights": files_root(folder)}, **about)
    entry = make_entry(parent.step if parent else 0, None, link)
    ledger.append(entry)
    return entry
