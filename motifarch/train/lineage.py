"""What each save stands on: the run's ledger, as rank 0 keeps it while it trains.

The first entry is of the first weights, which the seed makes or `run.init_from` gives; each later
one is of a checkpoint. A run that goes on from another run's checkpoint, or from the export of one,
takes its entries over, so that the chain goes back to the seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motifarch.files import SEAL, read_json
from motifarch.ledger.chain import Entry, Ledger, digest, make_entry
from motifarch.ledger.derived import derived_link, source_of
from motifarch.ledger.link import AVERAGE, CHECKPOINT, FIRST_WEIGHTS, START
from motifarch.ledger.made_with import environment
from motifarch.ledger.signing import Signer
from motifarch.train.inputs import Inputs
from motifarch.train.manifest import MANIFEST, read_manifest
from motifarch.train.read_recipe import to_dict
from motifarch.train.recipe import Recipe
from motifarch.train.run_folder import METRICS, last_metrics
from motifarch.train.saved_hashes import saved_roots

LINK = "link"
"""The field of a manifest's notes that holds its entry's link."""


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
            "model": self.ledger.keep(inputs.model_config.to_dict()),
            "environment": self.ledger.keep(environment(machine)),
            **_identities(inputs),
        }

    @property
    def newest(self) -> str | None:
        """The hash of the entry that the run goes on from."""
        return self._parent.hash if self._parent else None

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
            "kind": FIRST_WEIGHTS,
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
        """The entry that first weights go on from, which the ledger of a run or of a model's folder
        has, and what they are called.
        """
        other, entry = checkpoint_source(folder) if (folder / MANIFEST).is_file() else source_of(folder)
        if entry is None:
            return None, {"outside": folder.resolve().name}
        self.ledger.take_over(other, entry)
        return entry, {"entry": entry.hash}

    def go_on(self, checkpoint: Path) -> None:
        """Notes that the run goes on from a checkpoint, its own or another run's."""
        seal, manifest = manifest_seal(checkpoint), read_manifest(checkpoint)
        self._parent = self.ledger.of_manifest(seal)
        if self._parent is not None:
            return
        link = manifest["about"].get(LINK)
        if link is not None:
            # Saved, but killed before its entry was written.
            own = make_entry(manifest["step"], seal, link)
            if own.parent in {entry.hash for entry in self.ledger.entries}:
                self._add(own)
                return
        other, parent = checkpoint_source(checkpoint)
        if parent is None:
            self.warnings.append(
                f"{checkpoint} is in no ledger: that this run's weights come from its seed can't be shown any more"
            )
            origin = {"outside": "/".join(checkpoint.resolve().parts[-3::2])}
        else:
            self.ledger.take_over(other, parent)
            origin = None
        self._add(
            make_entry(
                manifest["step"],
                seal,
                {
                    "parent": parent.hash if parent else None,
                    "kind": START,
                    "weights": saved_roots(checkpoint).get("weights"),
                    "origin": origin,
                    **self._made_with,
                },
            )
        )

    def link(self, step: int, roots: Mapping[str, str]) -> dict[str, Any]:
        """What a checkpoint stands on, for its manifest."""
        since = self._parent.step if self._parent else 0
        return {
            "parent": self._parent.hash if self._parent else None,
            "kind": CHECKPOINT,
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


class AverageLineage:
    """Makes the entry of a mean of checkpoints, as `Lineage` does of a save.

    Args:
        folder: where the mean goes.
        run: of the checkpoints.
        checkpoints: the newest first.
    """

    def __init__(self, folder: Path, run: Path, checkpoints: Sequence[Path]) -> None:
        self._run = run
        self._ledger = Ledger.read(folder)
        ledger = Ledger.read(run)
        entries = [ledger.of_manifest(manifest_seal(path)) for path in checkpoints]
        self._of = [entry.hash if entry else None for entry in entries]
        self._parent = entries[0] if None not in entries else None
        if self._parent:
            self._ledger.take_over(ledger, self._parent)

    def link(self, step: int, roots: Mapping[str, str]) -> dict[str, Any]:
        """As `Lineage.link`."""
        return derived_link(self._ledger, AVERAGE, self._parent, self._run, roots, of=self._of)

    def saved(self, checkpoint: Path) -> None:
        """As `Lineage.saved`."""
        manifest = read_manifest(checkpoint)
        self._ledger.append(make_entry(manifest["step"], manifest_seal(checkpoint), manifest["about"][LINK]))


def checkpoint_source(checkpoint: Path) -> tuple[Ledger, Entry | None]:
    """The ledger of a checkpoint's run, and its entry there."""
    ledger = Ledger.read(checkpoint.resolve().parent.parent)
    return ledger, ledger.of_manifest(manifest_seal(checkpoint))


def manifest_seal(checkpoint: Path) -> str:
    """The hash that a checkpoint's manifest has of itself."""
    return str(read_json(checkpoint / MANIFEST)[SEAL])


def metrics_hash(output: Path, first: int, last: int) -> str:
    """The hash of a run's metrics over some steps, which are near the file's end."""
    return digest([row for row in last_metrics(output / METRICS, first) if first <= row["step"] <= last])


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


def _identities(inputs: Inputs) -> dict[str, Any]:
    return {
        "data": [data.fingerprint for data in inputs.training],
        "rows": [data.rows_root for data in inputs.training],
        "tokenizer": inputs.training[0].tokenizer_fingerprint,
    }
