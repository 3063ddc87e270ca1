"""Growing a folder: the plan, its check against the model that will load it, and the writing."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from motifarch.errors import UserError
from motifarch.files import sha256, write_json
from motifarch.growth.compare import Described, Difference, config_of, difference
from motifarch.growth.depth import deepen
from motifarch.growth.experts import Experts, upcycle
from motifarch.growth.folders import CONFIG, MAX_SHARD_BYTES, FolderWriter, SourceFolder, bytes_of
from motifarch.growth.hyper_connections import add_hyper_connections
from motifarch.growth.layouts import Factors, factors_to, motif_config
from motifarch.growth.model_spec import ModelSpec, describe
from motifarch.growth.vocabulary import Vocabulary
from motifarch.growth.width import Noise, untie, widen
from motifarch.ledger.derived import note_derived, source_of
from motifarch.models.motif import MotifConfig, MotifForCausalLM

RECORD = "growth.json"


def plan(
    source: SourceFolder,
    factors: Factors | MotifConfig,
    *,
    noise: Noise | None = None,
    experts: Experts | None = None,
    streams: int | None = None,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
) -> ModelSpec:
    """Describes the grown model, and makes sure that its folder will load; arguments as
    :func:`grow`'s.

    Raises:
        UserError: the source is no Motif model or its tensors do not fit its config, or the growth
            does not fit it.
    """
    config = motif_config(source.config, source.path / CONFIG)
    if isinstance(factors, MotifConfig):
        factors = factors_to(config, factors)
    spec = describe(source, dtype)
    if config.tie_word_embeddings and "lm_head.weight" in spec.tensors:
        # Some folders hold the tied matrix twice; models load the embedding.
        tensors = {name: lazy for name, lazy in spec.tensors.items() if name != "lm_head.weight"}
        spec = dataclasses.replace(spec, tensors=tensors)
    _check_tensors(spec, f"{source.path} does not hold what its {CONFIG} describes")
    if factors.untie:
        spec = untie(spec)
    spec = widen(
        spec,
        hidden=factors.hidden,
        feed_forward=factors.feed_forward,
        heads=factors.heads,
        signal_heads=factors.signal_heads,
        noise=noise,
    )
    if factors.layers is not None:
        spec = deepen(spec, factors.layers)
    if experts is not None:
        spec = upcycle(spec, experts)
    if streams is not None:
        spec = add_hyper_connections(spec, streams)
    if vocabulary is not None:
        spec = vocabulary.of(spec, source.path)
    if not spec.steps:
        raise UserError(
            "nothing grows: give a factor above 1 (--hidden, --feed-forward, --signal-heads, --heads), more --layers, "
            "a larger layout with --like, --experts, --streams or a --tokenizer"
        )
    for derived in ("layer_types", "auto_map"):  # of the old depth; code that came with the old layout
        spec.config.pop(derived, None)
    _check_tensors(spec, "the grown tensors do not fit their config")
    return spec


def write(
    spec: ModelSpec,
    source: SourceFolder,
    output: Path,
    *,
    record: dict[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
    check: bool = True,
    base: ModelSpec | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    console: Console | None = None,
) -> Difference | None:
    """Makes the tensors of a spec one at a time and writes the folder, which appears when it
    is whole.

    Besides the weights it gets config.json, the source's tokenizer and generation files, and
    `growth.json`: the source's files with their SHA-256, the steps with what each could not keep,
    and the difference measured.

    Args:
        spec: what to write.
        source: the folder that it reads.
        output: the folder to make.
        record: more fields for `growth.json`.
        vocabulary: the tokenizer that takes the place of the source's.
        check: whether to run both models, a layer at a time, and compare their logits.
        base: the model that the source is, for the check; default: what the folder says.
        max_shard_bytes: of a file.
        console: where progress is shown; by default standard error.

    Returns:
        The difference of the logits, None without the check.

    Raises:
        UserError: the output exists or lies within the source, or a file can't be read or written.
    """
    if source.path.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"{output} lies within the source {source.path}, which is left as it is; give another output")
    console = Console(stderr=True) if console is None else console
    total = sum(bytes_of(lazy.shape, lazy.dtype) for lazy in spec.tensors.values())
    bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console)
    measured: Difference | None = None
    with (
        FolderWriter(
            output, spec.config, max_shard_bytes=max_shard_bytes, carry_from=source.path, report=console.print
        ) as writer,
        bar,
    ):
        task = bar.add_task("writing", total=total)
        for name, lazy in spec.tensors.items():
            writer.write(name, lazy.make(*map(source.read, lazy.sources)))
            bar.advance(task, bytes_of(lazy.shape, lazy.dtype))
        writer.finish()
        if vocabulary is not None:
            vocabulary.save(writer.folder)
        if check:
            grown = SourceFolder(writer.folder)
            first = source if base is None else Described(base, source)
            layers = [config_of(folder).num_hidden_layers for folder in (first, grown)]
            task = bar.add_task("comparing", total=sum(layers))
            measured = difference(first, grown, lambda: bar.advance(task), same_ids=spec.same_ids)
        task = bar.add_task("recording", total=None)
        origin_files = [source.path / CONFIG, *source.files]
        content = {
            "source": {
                "folder": source.path.name,
                "files": {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in origin_files},
            },
            "steps": [dataclasses.asdict(step) for step in spec.steps],
            "logits": dataclasses.asdict(measured) if measured else None,
        }
        write_json(writer.folder / RECORD, content | (record or {}))
        note_derived(writer.folder, "growth", source.path, source_of(source.path))
    return measured


def grow(
    source: Path,
    output: Path,
    factors: Factors | MotifConfig,
    *,
    noise: Noise | None = None,
    experts: Experts | None = None,
    streams: int | None = None,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> Difference | None:
    """Makes a larger model of a Motif model's folder, which computes the same function at the
    start.

    Args:
        source: a Hugging Face folder; it is only read.
        output: the folder to make.
        factors: how the model grows, or the layout that it is to have.
        noise: makes copies differ, so that training can tell them apart; it cancels in what they
            compute.
        experts: what dense feed-forward blocks become, after they have grown.
        streams: of hyper-connections in place of the residual stream.
        vocabulary: a tokenizer that extends the model's.
        dtype: of the grown weights; None keeps the source's.
        check: whether to compare the logits of both models.

    Returns:
        The difference of the logits, None without the check.

    Raises:
        UserError: something does not fit, is missing or is damaged; the message names it and the
            fix.
    """
    folder = SourceFolder(source)
    spec = plan(folder, factors, noise=noise, experts=experts, streams=streams, vocabulary=vocabulary, dtype=dtype)
    return write(spec, folder, output, vocabulary=vocabulary, check=check)


def _check_tensors(spec: ModelSpec, message: str) -> None:
    """Compares names and shapes with those of the model that the config makes."""
    with torch.device("meta"):
        config = MotifConfig.from_dict(spec.config)
        state = MotifForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name in (*state, *spec.tensors):
        if name not in spec.tensors:
            raise UserError(f"{message}: {name} is missing")
        if name not in state:
            raise UserError(f"{message}: {name} is no tensor of this model")
        if tuple(state[name].shape) != spec.tensors[name].shape:
            raise UserError(
                f"{message}: {name} is {spec.tensors[name].shape}, where {tuple(state[name].shape)} is expected"
            )
