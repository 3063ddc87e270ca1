"""A larger vocabulary: rows of the embedding and of the output projection for new tokens."""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from motifarch.errors import UserError
from motifarch.growth.folders import CARRIED
from motifarch.growth.model_spec import ModelSpec, Step, draw_for
from motifarch.tokenizer.loading import open_vocabulary, vocabulary_size

_ROWS = ("model.embed_tokens.weight", "lm_head.weight")
_LARGEST_MULTIPLE = 128
"""Of rows, that an embedding is padded to."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that a model is to have in place of its own, which it extends.

    Args:
        tokenizer: as `motifarch tokenizer extend` takes one.
        random: see :func:`with_vocabulary`, as for the seed.
        seed: of new rows that are drawn.
    """

    tokenizer: str
    random: bool = False
    seed: int = 0

    def of(self, spec: ModelSpec, source: Path) -> ModelSpec:
        """The model of a folder, which has its tokenizer, with rows for this one."""
        new = open_vocabulary(self.tokenizer)
        return with_vocabulary(spec, open_vocabulary(source), new, random=self.random, seed=self.seed)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files in place of those that are there."""
        for path in list(folder.iterdir()):
            if path.name != "generation_config.json" and any(fnmatch(path.name, pattern) for pattern in CARRIED):
                path.unlink()
        open_vocabulary(self.tokenizer).save_pretrained(folder)


def with_vocabulary(
    spec: ModelSpec,
    old: PreTrainedTokenizerFast,
    new: PreTrainedTokenizerFast,
    *,
    random: bool = False,
    seed: int = 0,
) -> ModelSpec:
    """Gives a model rows for the tokens that a tokenizer has more than its own.

    A new token's row is the mean of the rows of the old tokens that its text had: for the output
    projection too, so that a new token is about as likely as they were. Text without new tokens
    gets the logits that it got, for all old tokens.

    Args:
        spec: of a Motif model.
        old: the model's tokenizer.
        new: one that extends it.
        random: draw new rows, with the standard deviation of the old ones, in place of the means.
        seed: of what is drawn.

    Raises:
        UserError: the new tokenizer is no extension of the old one, or the model lacks rows for it.
    """
    rows, first, size = int(spec.config["vocab_size"]), vocabulary_size(old), vocabulary_size(new)
    if first > rows:
        raise UserError(
            f"the model's tokenizer has ids up to {first - 1:,}, and the model {rows:,} rows: it is not its tokenizer"
        )
    _check_extension(old, new)
    # As much padding as the model had.
    multiple = next(m for m in (_LARGEST_MULTIPLE, 64, 32, 16, 8, 4, 2, 1) if rows % m == 0)
    padded = max(rows, -(-size // multiple) * multiple)
    pieces = _pieces(old, new, first, size)
    tensors = dict(spec.tensors)
    for name in _ROWS:
        if name in tensors:
            make = partial(
                _rows, pieces=pieces, first=first, rows=padded, draw=draw_for(name, seed) if random else None
            )
            tensors[name] = tensors[name].then((padded, tensors[name].shape[1]), make)
    how = "drawn" if random else "means of the tokens that they replace"
    step = Step(f"vocabulary {first:,} -> {size:,} tokens ({rows:,} -> {padded:,} rows), new rows {how}")
    grown = spec.changed({"vocab_size": padded}, tensors, step)
    return grown.comparing(first)


def _check_extension(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> None:
    known = {number: token for token, number in new.get_vocab().items()}
    for token, number in sorted(old.get_vocab().items(), key=lambda item: item[1]):
        if known.get(number) != token:
            raise UserError(
                f"--tokenizer is no extension of the model's: id {number:,} is {token!r} there, and "
                f"{known.get(number)!r} here; make one with motifarch tokenizer extend"
            )
    if len(new.get_vocab()) == len(old.get_vocab()):
        raise UserError("--tokenizer has no token that the model's has not: there is nothing to grow")


def _pieces(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, first: int, size: int) -> list[list[int]]:
    """Of each new id, the old tokens of its text; of an id without a token, none."""
    backend = old.backend_tokenizer
    added = {token["content"] for token in json.loads(new.backend_tokenizer.to_str())["added_tokens"]}
    found: list[list[int]] = []
    tokens = {number: token for token, number in new.get_vocab().items()}
    for number in range(first, size):
        token = tokens.get(number)
        if token is None:
            found.append([])
        elif token in added:
            found.append(backend.encode(token, add_special_tokens=False).ids)
        else:
            found.append([piece.id for piece in backend.model.tokenize(token)])
    return found


def _rows(old: Tensor, *, pieces: list[list[int]], first: int, rows: int, draw: torch.Generator | None) -> Tensor:
    """Old rows, new ones, and padding."""
    made = old.new_zeros(rows, old.shape[1])
    made[:first] = old[:first]
    if len(old) > first + len(pieces):
        made[first + len(pieces) : len(old)] = old[first + len(pieces) :]
    spread = None if draw is None else old[:first].float().std()
    for number, of_token in enumerate(pieces, first):
        if spread is not None:
            made[number] = torch.randn(old.shape[1], generator=draw) * spread
        elif of_token:
            made[number] = old[of_token].float().mean(0)
    return made
