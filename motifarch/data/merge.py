"""One prepared folder of the shards that several machines made of the same documents."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

from motifarch.data.arrow_files import block_features, block_tables, save, write_tables
from motifarch.data.loss_mask import with_mask
from motifarch.data.manifest import FILE_NAME, Manifest, SplitCounts
from motifarch.data.packed import Block, PackedDataset
from motifarch.data.row_tree import RowTree
from motifarch.errors import UserError
from motifarch.files import claim_folder, new_folder, remove
from motifarch.progress import progress

_NAMES_KEPT = 100
_MAY_DIFFER = ("shard", "tokenizer", "chat_template")  # paths, whose contents the fingerprint has


def merge(folders: Sequence[Path], output: Path, report: Callable[[str], None]) -> Manifest:
    """Write the blocks of all shards, the first shard's first, whatever order they are given in.

    The documents of both splits are those that one machine has. They are packed shard by shard, so
    that their order is another, and that each shard drops its own last, partial block.

    Raises:
        UserError: the folders are not all shards of one set, or the output is something else.
    """
    shards = _in_order(folders)
    manifest = _merged([made for _, made in shards])
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if (output / FILE_NAME).is_file() and Manifest.read(output).fingerprint == manifest.fingerprint:
            return manifest
        raise UserError(f"--output {output} is there already, and holds something else: give another, or remove it")
    with claim_folder(output, report), new_folder(output) as folder:
        copytree(shards[0][0] / "tokenizer", folder / "tokenizer")
        for split in manifest.splits:
            sources = [PackedDataset.open(shard, split) for shard, _ in shards]
            scratch, tree = folder / f"{split}.arrow", RowTree()
            with progress(f"merging {split}", manifest.splits[split].blocks) as advance:
                tables = block_tables(tree.over(_blocks(sources, advance)), manifest.seq_len)
                rows = write_tables(scratch, tables, block_features(manifest.seq_len))
            save(rows, folder / split)
            manifest.splits[split].rows_root = tree.root()
            del rows
            remove(scratch)
        manifest.write(folder)
    return manifest


def _in_order(folders: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    """The folders by their shards' numbers, checked."""
    found: dict[int, tuple[Path, Manifest]] = {}
    first, first_made = folders[0], Manifest.read(folders[0])
    for folder in folders:
        made = Manifest.read(folder)
        if not made.settings.get("shard"):
            raise UserError(f"{folder} is no shard: prepare each with --shard K/N, the other options the same")
        for name in (first_made.settings | made.settings).keys() - _MAY_DIFFER:
            values = [one.settings.get(name) for one in (first_made, made)]
            if values[0] != values[1]:
                raise UserError(
                    f"{first} and {folder} differ in {name} ({values[0]!r}, {values[1]!r}): prepare one anew"
                )
        if _sizes(made) != _sizes(first_made):
            raise UserError(f"{first} and {folder} were prepared from sources of different size: prepare one anew")
        if made.tokenizer_fingerprint != first_made.tokenizer_fingerprint:
            raise UserError(f"{first} and {folder} have different tokenizers: prepare one anew with the other's")
        number, of = map(int, made.settings["shard"].split("/"))
        if of != len(folders):
            raise UserError(f"{folder} is shard {number} of {of}, and {len(folders)} folders are given: give all {of}")
        if number in found:
            raise UserError(f"{found[number][0]} and {folder} are both shard {number}/{of}: give each once")
        found[number] = folder, made
    return [found[number] for number in sorted(found)]


def _sizes(made: Manifest) -> list[tuple[str, Any, Any]]:
    """Files and bytes of each source; time stamps differ between machines."""
    states = ((state["name"], state.get("files"), state.get("bytes")) for state in made.inputs)
    return [state for state in states if not state[0].startswith("--")]


def _blocks(sources: Sequence[PackedDataset], advance: Callable[[], None]) -> Iterator[Block]:
    for source in sources:
        for index in range(len(source)):
            block = source[index]
            if block.loss_mask is not None:
                block = Block(with_mask(block.input_ids, block.loss_mask), block.doc_lengths)
            yield block
            advance()


def _merged(shards: Sequence[Manifest]) -> Manifest:
    first = shards[0]
    return Manifest(
        seq_len=first.seq_len,
        vocab_size=first.vocab_size,
        eos_token_id=first.eos_token_id,
        fingerprint=hashlib.sha256(repr(("merged", *(shard.fingerprint for shard in shards))).encode()).hexdigest(),
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        splits={split: _sum([shard.splits[split] for shard in shards]) for split in first.splits},
        settings=first.settings | {"shard": None},
        inputs=first.inputs,
        skipped=_sum_tallies([shard.skipped for shard in shards]),
        versions=first.versions,
        notes=[f"shard {shard.settings['shard']}: {note}" for shard in shards for note in shard.notes],
        loss_mask=first.loss_mask,
        filtered=_sum_tallies([shard.filtered for shard in shards]),
        lengths=[one | {"shard": shard.settings["shard"]} for shard in shards for one in shard.lengths],
        truncated=_sum_tallies([shard.truncated for shard in shards]),
    )


def _sum(counts: Sequence[SplitCounts]) -> SplitCounts:
    def total(name: str) -> Any:
        if name == "rows_root":  # of all rows together, which their numbers decide
            return None
        values = [getattr(one, name) for one in counts]
        return None if None in values else sum(values)

    return SplitCounts(**{name: total(name) for name in SplitCounts.__dataclass_fields__})


def _sum_tallies(tallies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reasons: dict[str, dict[str, Any]] = {}
    for tally in tallies:
        for reason, found in tally.get("reasons", {}).items():
            one = reasons.setdefault(reason, {"count": 0, "names": []})
            one["count"] += found["count"]
            one["names"] = [*one["names"], *found["names"]][:_NAMES_KEPT]
    return {"count": sum(one["count"] for one in reasons.values()), "reasons": reasons}
