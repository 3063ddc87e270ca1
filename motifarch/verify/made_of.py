"""Makes a folder again from what it was made of: an export, an average, or a run's first weights
from `run.init_from`.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from motifarch.average import average
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.ledger.chain import Entry, Ledger
from motifarch.ledger.derived import files_root, source_of
from motifarch.ledger.link import AVERAGE, FIRST_WEIGHTS
from motifarch.train.init_from import load_weights
from motifarch.train.lineage import checkpoint_source, manifest_seal
from motifarch.train.manifest import MANIFEST, checkpoints_folder, complete_checkpoints
from motifarch.train.saved_hashes import saved_roots, weights_root
from motifarch.verify.findings import Findings
from motifarch.verify.first_weights import model_of_seed
from motifarch.verify.links import own_entries

CHECK = "Made again from what it was made of, it has the same weights."


def verify_made_of(folder: Path, source: Path, ledger: Ledger, chain: Sequence[Entry]) -> Findings:
    """Makes it again, and compares.

    Args:
        folder: what is verified.
        source: what it was made of: a run's folder, one of its checkpoints, or a model's folder.
        ledger: the folder's.
        chain: its entries, the newest first.

    Raises:
        UserError: the source is damaged, or does not fit.
    """
    found = Findings()
    own = own_entries(list(chain))
    made = own[-1] if own else chain[0]
    if made.parent is None:
        found.add(CHECK, unknown="it was made of nothing else")
        return found
    given = _with_entry(source, made.parent)
    if given is None:
        found.add(CHECK, [f"{source.name} is not what its entry names, or no longer as it was"])
        return found
    with TemporaryDirectory(prefix="motifarch_made_of_") as work:
        again = _again(folder, given, made, ledger, Path(work) / "again")
    if again is None:
        found.add(CHECK, unknown=f"an entry of kind {made.link['kind']!r} can't be made again here")
    else:
        found.add(CHECK, [] if again == made.link["weights"] else ["they are others"])
    return found


def _with_entry(source: Path, entry: str) -> Path | None:
    """The checkpoint or model folder that an entry is of."""
    if (source / "config.json").is_file():
        newest = source_of(source)[1]
        return source if newest is not None and newest.hash == entry else None
    checkpoints = [source] if (source / MANIFEST).is_file() else complete_checkpoints(checkpoints_folder(source))
    found = ((path, checkpoint_source(path)[1]) for path in checkpoints)
    return next((path for path, own in found if own is not None and own.hash == entry), None)


def _again(folder: Path, source: Path, made: Entry, ledger: Ledger, work: Path) -> str | None:
    """The root over the weights that are made anew."""
    kind = made.link["kind"]
    if kind == "export":
        options = {name: made.link[name] for name in ("dtype", "adapter")}
        return files_root(export(source, work, tokenizer=str(folder), **options))
    if kind == AVERAGE:
        steps = len(made.link["of"])
        run = source.resolve().parent.parent
        newest = complete_checkpoints(checkpoints_folder(run), limit=1, hashes=False)
        if [manifest_seal(path) for path in newest] != [manifest_seal(source)]:
            raise UserError(f"{run.name} has gone on since {folder.name} was made; give the run as it was then")
        return saved_roots(average(run, work, steps))["weights"]
    if kind == FIRST_WEIGHTS:
        try:
            model = model_of_seed(ledger, made)
        except ValueError as error:
            raise UserError(f"{folder}: {error}; give a run whose ledger is whole") from None
        load_weights(source, model)
        return weights_root(model)
    return None
