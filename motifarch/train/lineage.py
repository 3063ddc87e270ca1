"""What each save stands on: the run's ledger, as rank 0 keeps it while it trains.

The first entry is of the first weights, which the seed makes or `run.init_from` gives; each later
one is of a checkpoint. A run that goes on from another run's checkpoint, or from the export of one,
takes its entries over, so that the chain goes back to the seed.
"""

import contextlib
import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motifarch.environment import git_state, installed_version
from motifarch.files import SEAL, read_json
from motifarch.ledger.chain import Entry, Ledger, digest, make_entry
from motifarch.ledger.code import sources_hash
from motifarch.ledger.signing import Signer
from motifarch.train.inputs import Inputs
from motifarch.train.manifest import MANIFEST, read_manifest
from motifarch.train.read_recipe import to_dict
from motifarch.train.recipe import Recipe
from motifarch.train.run_folder import METRICS, read_metrics

LINK = "link"
"""The field of a manifest's notes that holds its entry's link."""
_PACKAGES = ("motifarch", "torch", "triton", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


class Lineage:
    """Makes the entries of a run.

    Args:
        recipe: the run's.
        inputs: its data.
        machine: what it runs on: devices, ranks, precision.
        signer: signs the entries, if there is one.
    """

    def __init__(self, recipe: Recipe, inputs: Inputs, machine: Mapping[str, Any], signer: Signer | None) -> None:
        self._output, self._signer = Path(recipe.run.output), signer
        self.ledger = Ledger.read(self._output)
        self.warnings = [f"{self.ledger.path}: {problem}" for problem in self.ledger.problems]
        self._parent: Entry | None = None
        self._made_with = {
            "recipe": self.ledger.keep(_deciding(recipe)),
            "environment": self.ledger.keep(_environment(machine)),
            **_identities(inputs),
        }

    def begin(self, weights: str, seed: int, init_from: Path | None) -> None:
        """Notes first weights.

        Args:
            weights: the root over them.
            seed: what made them, if nothing gave them.
            init_from: the checkpoint or folder that gave them.
        """
        parent, origin = None, None
        if init_from is not None:
            parent, origin = self._origin(init_from)
        link = {
            "parent": parent.hash if parent else None,
            "kind": "first weights",
            "weights": weights,
            "seed": seed,
            "origin": origin,
            **self._made_with,
        }
        if self.ledger.entries and self.ledger.entries[-1].link == link:
            self._parent = self.ledger.entries[-1]  # a start that came to no checkpoint
        else:
            self._add(make_entry(0, None, link))

    def _origin(self, folder: Path) -> tuple[Entry | None, dict[str, Any]]:
        """The entry that first weights go on from, which the ledger of a run or an export has, and
        what they are called.
        """
        is_checkpoint = (folder / MANIFEST).is_file()
        other = Ledger.read(folder.parent.parent if is_checkpoint else folder)
        entry = None
        if is_checkpoint:
            entry = other.of_manifest(manifest_seal(folder))
        elif other.entries:
            entry = other.entries[-1]
        if entry is None:
            return None, {"outside": folder.name}
        self._take_over(other)
        return entry, {"run": entry.hash}

    def go_on(self, checkpoint: Path) -> None:
        """Notes that the run goes on from a checkpoint, its own or another run's."""
        seal, manifest = manifest_seal(checkpoint), read_manifest(checkpoint)
        self._parent = self.ledger.of_manifest(seal)
        if self._parent is None:
            self._take_over(Ledger.read(checkpoint.parent.parent))
            self._parent = self.ledger.of_manifest(seal)
        link = manifest["about"].get(LINK)
        if self._parent is None and link is not None:
            # Saved, but killed before its entry was written.
            own = make_entry(manifest["step"], seal, link)
            if own.parent in {entry.hash for entry in self.ledger.entries}:
                self._add(own)
        if self._parent is None:
            self.warnings.append(
                f"{checkpoint} is in no ledger: that this run's weights come from its seed can't be shown any more"
            )

    def _take_over(self, other: Ledger) -> None:
        """Adds another ledger's entries, and what lies beside them."""
        known = {entry.hash for entry in self.ledger.entries}
        for entry in other.entries:
            if entry.hash not in known:
                self.ledger.append(entry)
            for name in ("recipe", "environment"):
                with contextlib.suppress(ValueError, KeyError):  # what is missing there is missing here
                    self.ledger.keep(other.kept(entry.link[name]))

    def link(self, step: int, roots: Mapping[str, str]) -> dict[str, Any]:
        """What a checkpoint stands on, for its manifest."""
        since = self._parent.step if self._parent else 0
        return {
            "parent": self._parent.hash if self._parent else None,
            "kind": "checkpoint",
            **roots,
            "metrics": {"from": since + 1, "to": step, "sha256": metrics_hash(self._output, since + 1, step)},
            **self._made_with,
        }

    def saved(self, checkpoint: Path) -> None:
        """Adds the entry of a checkpoint that is complete."""
        manifest = read_manifest(checkpoint)
        self._add(make_entry(manifest["step"], manifest_seal(checkpoint), manifest["about"][LINK]))

    def _add(self, entry: Entry) -> None:
        if self._signer is not None:
            entry = dataclasses.replace(entry, signature=self._signer.sign(entry.hash))
        self.ledger.append(entry)
        self._parent = entry


def manifest_seal(checkpoint: Path) -> str:
    """The hash that a checkpoint's manifest has of itself."""
    return str(read_json(checkpoint / MANIFEST)[SEAL])


def metrics_hash(output: Path, first: int, last: int) -> str:
    """The hash of a run's metrics over some steps."""
    return digest([row for row in read_metrics(output / METRICS) if first <= row["step"] <= last])


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """A recipe without where its files lie and what is shown."""
    content = to_dict(recipe)
    for section, names in {
        "run": ("output", "resume", "stop_at"),
        "checkpoint": ("mirror", "sign_with"),
        "log": (),
    }.items():
        content[section] = {name: value for name, value in content[section].items() if name not in names}
    content.pop("log")
    return content


def _environment(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "code": {"sources": sources_hash(), "git": git_state()},
        "versions": {name: version for name in _PACKAGES if (version := installed_version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        **machine,
    }


def _identities(inputs: Inputs) -> dict[str, Any]:
    found = inputs.fingerprints()
    return {"data": [entry["fingerprint"] for entry in found["data"]], "tokenizer": found["tokenizer"]}
