"""Opens what a recipe names and checks that it fits together, before any process group exists."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from motifarch.data import (
    BatchSchedule,
    DataShape,
    Mixture,
    MixtureComponent,
    PackedDataset,
    check_same_seq_len,
    check_same_tokenizer,
)
from motifarch.errors import UserError
from motifarch.field_types import is_import_path
from motifarch.models.motif import MotifConfig, MotifForCausalLM, register_attention
from motifarch.train.manifest import (
    checkpoints_folder,
    counts_as_saved,
    damage,
    find_newest,
    is_of_newer_format,
    list_checkpoints,
    step_of,
)
from motifarch.train.recipe import BatchSection, Recipe
from motifarch.train.remote_run import fetch_newer


@dataclass
class Inputs:
    """A recipe's data and model, opened and resolved."""

    training: list[PackedDataset]
    """The mixture's training splits."""
    validation: list[PackedDataset]
    """Their validation splits; empty where the recipe never validates."""
    mixture: Mixture
    """The sampler of global batches."""
    model_config: MotifConfig

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return self.training[0].seq_len

    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of data and tokenizer, for the record and for resuming."""
        return {
            "data": [{"path": str(d.folder), "fingerprint": d.fingerprint} for d in self.training],
            "tokenizer": self.training[0].tokenizer_fingerprint,
        }


def bytes_per_token(datasets: Sequence[PackedDataset], weights: Sequence[float] = ()) -> float | None:
    """UTF-8 bytes of text for each token of a mixture; None where some data do not say.

    Without weights, each dataset has the same share of the tokens.
    """
    shares = weights or [1.0] * len(datasets)
    found = [dataset.bytes_per_token for dataset in datasets]
    if not found or None in found or not sum(shares):
        return None
    return sum(share * (each or 0.0) for share, each in zip(shares, found, strict=True)) / sum(shares)


def open_inputs(recipe: Recipe) -> Inputs:
    """Opens the datasets and resolves the model config.

    Raises:
        UserError: naming what is missing or does not fit, and the fix.
    """
    entries = recipe.data.datasets
    training = [PackedDataset.open(entry.path, "train") for entry in entries]
    validation = [PackedDataset.open(entry.path, "validation") for entry in entries] if recipe.validation.every else []
    check_same_seq_len(training)
    check_same_tokenizer(training)
    mixture = Mixture(
        [MixtureComponent(d, entry.weight, entry.weight_end) for d, entry in zip(training, entries, strict=True)],
        seed=recipe.run.seed,
        batch_schedule=batch_schedule(recipe.batch),
        ramp_start=recipe.data.ramp_start,
        ramp_end=recipe.data.ramp_end,
    )
    return Inputs(training, validation, mixture, model_config(recipe, training[0].shape))


def batch_schedule(batch: BatchSection) -> BatchSchedule:
    """The global batch of each step."""
    start = batch.size if batch.warmup_start is None else batch.warmup_start
    multiple = batch.warmup_multiple or math.gcd(start, batch.size)
    return BatchSchedule(batch.size, start=start, warmup_steps=batch.warmup_steps, multiple=multiple)


def model_config(recipe: Recipe, data: DataShape) -> MotifConfig:
    """The config of a recipe's model.

    The data gives the vocabulary size where the recipe leaves it open, and the end-of-text id.

    Raises:
        UserError: the model section fits neither itself nor the data.
    """
    fields = dataclasses.asdict(recipe.model)
    if is_import_path(recipe.model.attention_type):
        try:
            register_attention(recipe.model.attention_type)
        except ValueError as error:
            raise UserError(f"model.attention_type: {error}") from None
    multiple = fields.pop("vocab_multiple")
    if fields["vocab_size"] is None:
        fields["vocab_size"] = -(-data.vocab_size // multiple) * multiple
    if fields["vocab_size"] < data.vocab_size:
        raise UserError(
            f"model.vocab_size is {fields['vocab_size']}, but the tokenizer of {data.folder} has "
            f"{data.vocab_size} tokens; use at least {data.vocab_size}, or null to take the tokenizer's"
        )
    if data.seq_len > recipe.model.max_position_embeddings:
        raise UserError(
            f"model.max_position_embeddings is {recipe.model.max_position_embeddings}, but the sequences of "
            f"{data.folder} are {data.seq_len} tokens long; use at least {data.seq_len}"
        )
    try:
        config = MotifConfig(**fields, eos_token_id=data.eos_token_id)
        # Refuses a bad combination now, at no cost, rather than on every rank after the start.
        with torch.device("meta"):
            MotifForCausalLM(config)
    except (ValueError, StrictDataclassError) as error:
        # The last line says what is wrong; one before it names the validator.
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UserError(f"the model section of the recipe: {reason}") from None
    return config


def find_parent(recipe: Recipe, warnings: list[str]) -> Path | None:
    """Finds the complete checkpoint that `run.resume` continues; None starts from scratch.

    `warnings` gets a line for each checkpoint that is passed over.

    Raises:
        UserError: the one named is unusable, or the output folder holds another run, or
            checkpoints that can't be used, which starting from scratch would replace.
    """
    output = Path(recipe.run.output)
    newest = find_newest(output, warnings.append)
    if recipe.checkpoint.mirror and recipe.run.resume == "auto":
        newest = fetch_newer(recipe.checkpoint.mirror, output, newest, warnings.append)
    _check_nothing_is_lost(output, newest)
    if recipe.run.resume == "auto":
        return newest
    if recipe.run.resume == "none":
        if newest:
            raise UserError(
                f"run.resume is none, but {output} holds a run already (its newest checkpoint is {newest.name}); "
                "continue it with --run.resume auto, or start in another folder with --run.output"
            )
        return None
    parent = Path(recipe.run.resume)
    if not parent.is_dir():
        raise UserError(f"run.resume is {parent}, which is no folder; accepted: auto, none, or a checkpoint's folder")
    if reason := damage(parent):
        raise UserError(f"run.resume is {parent}, which can't be used: {reason}")
    if newest and (newest.resolve().parent != parent.resolve().parent or step_of(newest) != step_of(parent)):
        raise UserError(
            f"run.resume is {parent}, but {output} holds another checkpoint, {newest.name}; to branch off, "
            "give the new run a folder of its own with --run.output"
        )
    return parent


def _check_nothing_is_lost(output: Path, newest: Path | None) -> None:
    there = [checkpoint for checkpoint in list_checkpoints(output) if counts_as_saved(checkpoint)]
    for checkpoint in there:
        if is_of_newer_format(checkpoint):
            reason = damage(checkpoint, hashes=False)
            raise UserError(
                f"the checkpoint {checkpoint} can't be used: {reason}; go on with the version that wrote it, or begin "
                "another run with --run.output"
            )
    if there and newest is None:
        reasons = "; ".join(f"{checkpoint.name}: {damage(checkpoint)}" for checkpoint in there[:3])
        raise UserError(
            f"no checkpoint in {checkpoints_folder(output)} can be used ({reasons}), and starting from scratch would "
            "replace them: put a whole copy of one back, begin another run with --run.output, or remove that folder "
            "to start over in this one"
        )
