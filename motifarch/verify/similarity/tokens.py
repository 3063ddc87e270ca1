"""The tokens that two folders' tokenizers share, by their strings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens, and the merges that make them."""

    ids: dict[str, int]
    merges: list[Any]

    @classmethod
    def read(cls, folder: Path) -> "Vocabulary | None":
        """That of a folder; None where it has no tokenizer.json that lists its tokens."""
        try:
            content = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"]
            # Unigram keeps [token, score] pairs, whose places are the ids.
            ids = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
            return cls(ids | added, content["model"].get("merges") or [])
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Overlap:
    """How much of two tokenizers is the same."""

    shared: int
    jaccard: float
    same_merges: bool


def overlap(one: Vocabulary, two: Vocabulary) -> Overlap:
    """Token strings that both have, whatever their ids; whether the merges are the same list."""
    shared = len(one.ids.keys() & two.ids.keys())
    return Overlap(shared, shared / len(one.ids.keys() | two.ids.keys()), one.merges == two.merges)


def same_tokens(one: Vocabulary | None, two: Vocabulary | None, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows (n,) of two embeddings that stand for the same tokens.

    By the tokens' strings where both folders have a tokenizer, else by place.

    Args:
        one: the first folder's vocabulary.
        two: the second's.
        rows: rows of the two embeddings.
    """
    if one is None or two is None:
        places = torch.arange(min(rows))
        return places, places
    common = [
        (i, two.ids[token])
        for token, i in one.ids.items()
        if token in two.ids and i < rows[0] and two.ids[token] < rows[1]
    ]
    pairs = torch.tensor(sorted(common), dtype=torch.long).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
