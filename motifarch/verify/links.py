"""Checks every link of a chain, offline; of a run, without reading a tensor."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError

from motifarch.data.manifest import Manifest
from motifarch.data.row_tree import proves
from motifarch.errors import UserError, first_line
from motifarch.ledger.chain import Entry, Ledger, digest, outside
from motifarch.ledger.derived import files_root
from motifarch.ledger.link import CHECKPOINT, FIRST_WEIGHTS, KEPT, START
from motifarch.ledger.signing import is_signed
from motifarch.train.lineage import LINK, manifest_seal
from motifarch.train.manifest import checkpoints_folder, complete_checkpoints, damage, list_checkpoints, read_manifest
from motifarch.train.run_folder import METRICS, read_metrics, read_record
from motifarch.train.saved_hashes import saved_roots
from motifarch.verify.findings import Findings


def chain_of(folder: Path) -> tuple[Ledger, list[Entry]]:
    """The ledger of a run or of a model's folder, and the entries that its newest checkpoint or its
    weights stand on, the newest first.

    Raises:
        UserError: the folder holds no ledger.
    """
    ledger = Ledger.read(folder)
    if not ledger.entries and not ledger.problems:
        raise UserError(
            f"{folder} has no ledger ({ledger.path.relative_to(folder)}); give a run's output folder or a model's, "
            "made by a version of motifarch that keeps one"
        )
    head = ledger.entries[-1] if ledger.entries else None
    newest = next(iter(complete_checkpoints(checkpoints_folder(folder), limit=1, hashes=False)), None)
    if newest is not None:
        head = ledger.of_manifest(manifest_seal(newest)) or head
    return ledger, list(ledger.back_from(head)) if head else []


def own_entries(chain: list[Entry]) -> list[Entry]:
    """Those that the folder's own run made, the newest first: without what it began with from
    elsewhere, and none of an average's or a model's folder.
    """
    if not chain or chain[0].link["kind"] not in (CHECKPOINT, FIRST_WEIGHTS, START):
        return []
    begun = next((i for i, entry in enumerate(chain) if entry.link["kind"] in (FIRST_WEIGHTS, START)), len(chain))
    return chain[: begun + 1]


def verify_links(folder: Path, *, keys: Iterable[str] = ()) -> Findings:
    """Checks the folder of a run, an average, an export or a grown model.

    Args:
        folder: it; of a model's folder, the weights are read.
        keys: public keys, as OpenSSH writes them; where there are some, every entry has to be
            signed by one of them.

    Raises:
        UserError: the folder holds no ledger.
    """
    ledger, chain = chain_of(folder)
    own = own_entries(chain)
    found = Findings()
    found.add("The ledger is as it was written, each entry with the hash of the one before it.", ledger.problems)
    _check_ends(found, chain)
    if any(folder.glob("*.safetensors")):
        _check_weights(found, folder, chain)
    if list_checkpoints(folder):
        _check_checkpoints(found, folder, ledger)
    if own:
        _check_metrics(found, folder, own)
    _check_kept(found, folder, ledger, chain)
    _check_data(found, folder, chain)
    _check_signatures(found, chain, [" ".join(key.split()[:2]) for key in keys])
    return found


def _check_ends(found: Findings, chain: list[Entry]) -> None:
    check = "What is here goes back, save by save, to weights that a seed made."
    if not chain:
        found.add(check, ["no entry holds"])
        return
    first = chain[-1]
    if origins := outside(chain):
        found.add(check, [f"what it was made from came from outside: {name}" for name in origins])
    elif first.parent is not None or first.link.get("kind") != FIRST_WEIGHTS:
        found.add(check, [f"the chain breaks off before step {first.step}"])
    else:
        found.add(check)


def _check_weights(found: Findings, folder: Path, chain: list[Entry]) -> None:
    try:
        same = bool(chain) and files_root(folder) == chain[0].link["weights"]
        problems = [] if same else ["they are others"]
    except (ValueError, SafetensorError, OSError) as error:
        problems = [first_line(error)]
    found.add("The weights of this folder are those of its entry.", problems)


def _check_checkpoints(found: Findings, folder: Path, ledger: Ledger) -> None:
    problems = []
    for checkpoint in list_checkpoints(folder):
        if reason := damage(checkpoint, hashes=False):
            problems.append(f"{checkpoint.name}: {reason}")
            continue
        entry, manifest = ledger.of_manifest(manifest_seal(checkpoint)), read_manifest(checkpoint)
        if entry is None:
            problems.append(f"{checkpoint.name} is in no entry")
        elif entry.link["kind"] == START:  # saved before there was a ledger
            continue
        elif entry.link != manifest["about"].get(LINK):
            problems.append(f"{checkpoint.name} stands on something else than its entry says")
        else:
            problems += _check_roots(checkpoint, entry)
    found.add("Each checkpoint that is there is the one of its entry.", problems)


def _check_roots(checkpoint: Path, entry: Entry) -> list[str]:
    try:
        own = saved_roots(checkpoint)
    except ValueError as error:
        return [f"{checkpoint.name}: {error}"]
    wrong = [name for name in ("weights", "state") if own.get(name) != entry.link[name]]
    return [f"{checkpoint.name}: the hashes of its tensors are not those of its entry ({' and '.join(wrong)})"] * bool(
        wrong
    )


def _check_metrics(found: Findings, folder: Path, chain: list[Entry]) -> None:
    by_step = {row["step"]: row for row in read_metrics(folder / METRICS)}
    problems = []
    for entry in chain:
        if "metrics" in entry.link:
            first, last = entry.link["metrics"]["from"], entry.link["metrics"]["to"]
            rows = [by_step[step] for step in range(first, last + 1) if step in by_step]
            if len(rows) < last + 1 - first:
                problems.append(f"{last + 1 - first - len(rows)} of the steps {first} to {last} have no row")
            elif digest(rows) != entry.link["metrics"]["sha256"]:
                problems.append(f"rows of steps {first} to {last} have changed")
    for entry, parent in pairwise(chain):
        if "metrics" in entry.link and (entry.link["metrics"]["from"], entry.link["metrics"]["to"]) != (
            parent.step + 1,
            entry.step,
        ):
            problems.append(f"the rows of step {entry.step}'s entry are not those since step {parent.step}")
    found.add(f"{METRICS} has the rows that were written, one for every step.", problems)


def _check_kept(found: Findings, folder: Path, ledger: Ledger, chain: list[Entry]) -> None:
    problems = []
    for entry in chain:
        for name in [name for name in KEPT if name in entry.link]:
            try:
                ledger.kept(entry.link[name])
            except ValueError as error:
                problems.append(f"{name} of step {entry.step}: {error}")
    record = read_record(folder)
    seeds = {entry.link["seed"] for entry in chain if "seed" in entry.link}
    if record and seeds and record.get("seed") not in seeds:
        problems.append(f"run.json says seed {record.get('seed')}, the ledger {', '.join(map(str, seeds))}")
    found.add(
        "Recipe, code and machine of each save are on record, and have not changed.", list(dict.fromkeys(problems))
    )


def _check_data(found: Findings, folder: Path, chain: list[Entry]) -> None:
    check = "The prepared data is that of the ledger."
    named = read_record(folder).get("data") or []
    expected = {value for entry in chain for value in entry.link.get("data", ())}
    problems, missing = [], []
    for entry in named:
        path = Path(entry["path"])
        if not path.is_dir():
            missing.append(str(path))
            continue
        try:
            fingerprint = Manifest.read(path).fingerprint
        except UserError as error:
            problems.append(str(error))
            continue
        if fingerprint not in expected:
            problems.append(f"{path} has the fingerprint {fingerprint[:12]}, which no entry names")
    found.add(check, problems, f"not here: {', '.join(missing)}" if missing or not named else "")


def verify_row(proof: Path, chain: list[Entry]) -> Findings:
    """Checks what `motifarch data prove` wrote: whether the row is in data that a chain names.

    Raises:
        UserError: the file can't be read.
    """
    try:
        content = json.loads(proof.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--row {proof} can't be read ({first_line(error)}); give what `motifarch data prove` wrote"
        ) from None
    roots = {root for entry in chain for root in entry.link.get("rows", ()) if root}
    found, check = Findings(), "The row is in the data of the ledger."
    if not roots:
        found.add(check, unknown="it was prepared by a version that kept no root over rows")
    else:
        found.add(check, [] if any(proves(content, root) for root in roots) else ["it is not"])
    return found


def _check_signatures(found: Findings, chain: list[Entry], keys: list[str]) -> None:
    signed = [entry for entry in chain if entry.signature is not None]
    if not signed and not keys:
        found.add("Entries are signed.", unknown="none is: checkpoint.sign_with signs them")
        return
    problems = []
    for entry in chain:
        if entry.signature is None:
            problems.append(f"step {entry.step} is not signed")
        elif not is_signed(entry.hash, dict(entry.signature)):
            problems.append(f"the signature of step {entry.step} is not of its entry")
        elif keys and entry.signature["key"] not in keys:
            problems.append(f"step {entry.step} is signed by another key: {entry.signature['key']}")
    by = sorted({entry.signature["key"] for entry in signed if entry.signature})
    found.add(f"Entries are signed by {', '.join(by) or 'the key that was given'}.", problems)
