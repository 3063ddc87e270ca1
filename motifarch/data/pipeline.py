"""Data preparation: read, split, train or load the tokenizer, tokenise, pack, publish."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from motifarch.counted import counted
from motifarch.data import manifest as manifest_file
from motifarch.data.arrow_files import block_features, block_tables, save, write_tables
from motifarch.data.conversations import Fitter, check_marks, set_chat_template
from motifarch.data.corpus import Corpus, Filter, read_corpus, shuffled
from motifarch.data.documents import ReadOptions, Tally
from motifarch.data.duplicates import ExactDuplicates, NearDuplicates
from motifarch.data.find_files import file_state, files_below
from motifarch.data.languages import InLanguages
from motifarch.data.lengths import source_lengths
from motifarch.data.manifest import Manifest, SplitCounts
from motifarch.data.packed import Block
from motifarch.data.packing import BlockPacker, DocumentPacker
from motifarch.data.row_tree import RowTree
from motifarch.data.settings import PrepareSettings
from motifarch.data.sources import Source, each_file_once, parse_source
from motifarch.data.tokenise import describe_tokens, tokenise
from motifarch.errors import UserError
from motifarch.files import claim_folder, new_folder
from motifarch.progress import Advance, progress
from motifarch.tokenizer.encoding import begin_tokens, chat_text, set_special_tokens
from motifarch.tokenizer.loading import composes, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from motifarch.tokenizer.train import capped, train_tokenizer

# Raised when the same text gives other blocks; how they are stored does not change what they are.
_CONTENT_VERSION = 1

Report = Callable[[str], None]

# More text hardly changes the merges, but its words would have to fit into memory.
_TRAINING_CHARACTERS = 2**26


def prepare(settings: PrepareSettings, report: Report) -> Manifest:
    """Make the prepared folder, or find it made with the same settings from the same inputs.

    A line about each stage goes to ``report``.

    Raises:
        UserError: for anything that the user can mend; the output folder is then as it was before.
    """
    settings.check()
    output = settings.output
    sources = [
        parse_source(spec, hf_split=settings.hf_split, streaming=settings.streaming) for spec in settings.sources
    ]
    inputs = [source.state() for source in sources]
    if settings.tokenizer is not None and (path := Path(settings.tokenizer)).exists():
        inputs.append({"name": f"--tokenizer {settings.tokenizer}", **file_state(files_below(path))})
    if settings.chat_template is not None:
        template = Path(settings.chat_template)
        inputs.append({"name": f"--chat-template {template}", **file_state(files_below(template))})
    if found := _already_prepared(settings, inputs):
        return found
    with claim_folder(output, report):
        # Once more: another process may have finished it, or a killed one may have moved it aside.
        if found := _already_prepared(settings, inputs):
            return found
        with new_folder(output) as folder:
            return _make(folder, settings, each_file_once(sources), inputs, report)


def _already_prepared(settings: PrepareSettings, inputs: list[dict[str, Any]]) -> Manifest | None:
    output = settings.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / manifest_file.FILE_NAME).is_file():
        raise UserError(f"--output {output} exists and is not a prepared data folder: give another one, or remove it")
    if settings.overwrite:
        return None
    existing = Manifest.read(output)
    changes = settings.changes(existing.settings)
    if not changes:
        before = {state["name"]: state for state in existing.inputs}
        changes = [f"the files of {s['name']} have changed" for s in inputs if before.get(s["name"]) != s]
    if changes:
        raise UserError(
            f"--output {output} was prepared differently ({'; '.join(changes)}): "
            "give another --output, or --overwrite to replace it"
        )
    if settings.strict and existing.skipped["count"]:
        reasons = "; ".join(f"{reason} ({found['names'][0]})" for reason, found in existing.skipped["reasons"].items())
        skipped = counted(existing.skipped["count"], "document")
        raise UserError(
            f"--strict: {output} was prepared with {skipped} skipped: {reasons}; "
            "remove them from the sources, or leave --strict out"
        )
    return existing


def _make(
    folder: Path, settings: PrepareSettings, sources: list[Source], inputs: list[dict[str, Any]], report: Report
) -> Manifest:
    scratch = folder / "scratch"
    scratch.mkdir()
    stage = partial(_stage, report)
    given = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
    if given and settings.chat_template is not None:
        set_chat_template(given, Path(settings.chat_template))
    template = check_marks(given) if given and settings.messages else None

    with stage("reading") as note:
        skipped, filtered, noticed, truncated = Tally(), Tally(), Tally(), Tally()
        options = ReadOptions(
            settings.field, settings.encoding, settings.document_separator, given and chat_text(given)
        )
        composing = given is None or composes(given)  # ours does
        tallies = {"skipped": skipped, "filtered": filtered, "noticed": noticed}
        filters = _filters(settings)
        corpus = read_corpus(
            scratch, settings, sources, **tallies, options=options, composes=composing, filters=filters
        )
        note(counted(len(corpus.rows), "conversation" if settings.messages else "document"))
    if filtered.counts:
        report(f"left out {counted(filtered.counts.total(), 'document')}: {filtered.summary()}")
    if skipped.counts:
        report(f"skipped {counted(skipped.counts.total(), 'document')}: {skipped.summary()}")

    if given is None:
        with stage("training the tokenizer") as note:
            texts = capped(corpus.training_texts(settings.seed), _TRAINING_CHARACTERS)
            with progress("training the tokenizer"):
                given = train_tokenizer(texts, settings.vocab_size)
            note(f"{len(given):,} tokens")
    set_special_tokens(given, settings.special_tokens)
    given.save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")  # as everyone will load it from now on

    with stage("tokenising") as note:
        tokenised = tokenise(scratch, corpus, tokenizer, settings.num_proc)
        note(counted(settings.num_proc, "process"))
    splits = {}
    eos, said = (tokenizer.eos_token, tokenizer.eos_token_id), skipped.counts.total()
    for split in ("train", "validation"):
        with stage(f"packing {split}") as note:
            fitter = Fitter(settings.seq_len, eos, skipped, truncated, noticed, settings.strict) if template else None
            splits[split] = _pack(scratch, folder / split, tokenised, corpus, settings, fitter)
            blocks = counted(splits[split].blocks, f"block of {settings.seq_len}")
            note(f"{counted(splits[split].tokens, 'token')}, {blocks}")
    if skipped.counts.total() > said:
        report(f"skipped {counted(skipped.counts.total(), 'document')} in all: {skipped.summary()}")
    if truncated.counts:
        dropped = sum(counts.dropped_tokens for counts in splits.values())
        conversations = counted(truncated.counts.total(), "conversation")
        report(f"truncated {conversations}: {truncated.summary()}; {counted(dropped, 'token')} lost")
    lengths = source_lengths(tokenised, corpus, [source.state()["name"] for source in sources])
    notes = [*noticed.lines(), *describe_tokens(corpus.rows, tokenised, tokenizer)]
    shutil.rmtree(scratch)

    fingerprint = tokenizer_fingerprint(tokenizer)
    decides: tuple[object, ...] = (
        corpus.content_hash,
        fingerprint,
        settings.seq_len,
        settings.seed,
        settings.validation_fraction,
    )
    if (begin := begin_tokens(tokenizer)) or settings.special_tokens != "text":
        decides += (begin, settings.special_tokens)
    if template is not None:
        decides += ("messages", template)
    result = Manifest(
        seq_len=settings.seq_len,
        vocab_size=vocabulary_size(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        fingerprint=hashlib.sha256(repr((_CONTENT_VERSION, *decides)).encode()).hexdigest(),
        tokenizer_fingerprint=fingerprint,
        splits=splits,
        settings=settings.deciding(),
        inputs=inputs,
        skipped=skipped.as_dict(),
        versions={name: version(name) for name in ("motifarch", "datasets", "tokenizers", "transformers", "pyarrow")},
        notes=notes,
        loss_mask=template is not None,
        filtered=filtered.as_dict(),
        lengths=lengths,
        truncated=truncated.as_dict(),
    )
    result.write(folder)
    return result


def _filters(settings: PrepareSettings) -> list[Filter]:
    filters: list[Filter] = [InLanguages(settings.languages)] if settings.languages else []
    if settings.deduplicate != "no":
        near = settings.deduplicate == "minhash"
        filters.append(NearDuplicates(settings.duplicate_threshold) if near else ExactDuplicates())
    return filters


def _pack(
    scratch: Path,
    folder: Path,
    tokenised: datasets.Dataset,
    corpus: Corpus,
    settings: PrepareSettings,
    fitter: Fitter | None,
) -> SplitCounts:
    """Pack a split: a stream of documents, or with a fitter whole conversations."""
    split, seq_len = folder.name, settings.seq_len
    packer: BlockPacker | DocumentPacker = BlockPacker(seq_len)
    if fitter:
        packer = DocumentPacker(seq_len, padding=~fitter.eos_token[1])

    columns = (shuffled(corpus.rows, settings.seed, "name"), shuffled(tokenised, settings.seed, "input_ids"))

    def blocks(documents: Iterable[tuple[str, np.ndarray]]) -> Iterator[Block]:
        for tokens in fitter.fit(documents) if fitter else (tokens for _, tokens in documents):
            yield from packer.add(tokens)
        yield from packer.finish()

    def documents(advance: Advance) -> Iterator[tuple[str, np.ndarray]]:
        for (name, _), (tokens, split_hash) in zip(*columns, strict=True):
            if corpus.split_of(split_hash) == split:
                yield name.as_py(), tokens.values.to_numpy()
            advance()

    tree = RowTree()
    with progress(f"packing {split}", len(tokenised)) as advance:
        tables = block_tables(tree.over(blocks(documents(advance))), seq_len)
        rows = write_tables(scratch / f"{split}.arrow", tables, block_features(seq_len))
    if not packer.blocks:
        raise UserError(
            f"the {split} part has {counted(packer.tokens, 'token')} in {counted(packer.documents, 'document')}, a "
            f"block needs {seq_len + 1:,}: give more text, a smaller --seq-len, or another --validation-fraction"
        )
    with progress(f"writing {split}"):
        save(rows, folder)
    counts = SplitCounts(packer.documents, packer.tokens, packer.blocks, packer.leftover, rows_root=tree.root())
    if fitter:
        counts.dropped_tokens, counts.trained_tokens = fitter.dropped_tokens, fitter.trained_tokens
        counts.padding_tokens = packer.padding_tokens
    else:  # a part of the tokens has no bytes of its own
        counts.bytes = _bytes_of(tokenised, corpus, split)
    return counts


def _bytes_of(tokenised: datasets.Dataset, corpus: Corpus, split: str) -> int:
    table = tokenised.data.table
    chosen = pc.less_equal(table.column("split_hash"), pa.scalar(corpus.last_validation_hash, pa.uint64()))
    chosen = chosen if split == "validation" else pc.invert(chosen)
    return int(pc.sum(pc.filter(table.column("bytes"), chosen)).as_py() or 0)


@contextmanager
def _stage(report: Report, name: str) -> Iterator[Callable[[str], None]]:
    begin = time.perf_counter()
    notes: list[str] = []
    yield notes.append
    report(f"{name}: {', '.join(notes)} ({time.perf_counter() - begin:.1f} s)")
