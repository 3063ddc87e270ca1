"""What tokenizers make of the same text."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from motifarch.files import atomic_write, write_json
from motifarch.tokenizer.loading import vocabulary_size
from motifarch.tokenizer.train import unicode_only

_AT_ONCE = 1 << 20
"""Characters that are encoded together."""
_LONGEST_SHOWN = 10


@dataclass
class Group:
    """Texts that are counted together."""

    documents: int = 0
    bytes: int = 0
    """In UTF-8."""
    characters: int = 0
    words: int = 0
    """Between spaces and line ends."""


@dataclass
class Counts:
    """A tokenizer's of a group."""

    tokens: int = 0
    changed: int = 0
    """Documents that do not come back from their tokens."""
    composed: int = 0
    """Documents that come back in NFC alone."""


@dataclass
class Measured:
    """What was counted.

    Attributes:
        groups: texts by name.
        counts: by tokenizer and group.
        used: by tokenizer, how often each id was seen.
    """

    tokenizers: Mapping[str, PreTrainedTokenizerFast]
    groups: dict[str, Group] = field(default_factory=dict)
    counts: dict[str, dict[str, Counts]] = field(default_factory=dict)
    used: dict[str, Counter[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON: sizes, and by group counts and their ratios."""
        return {name: self._of_tokenizer(name) for name in self.tokenizers}

    def _of_tokenizer(self, name: str) -> dict[str, Any]:
        tokenizer, used = self.tokenizers[name], self.used[name]
        special = set(tokenizer.all_special_ids)
        size = len(set(tokenizer.get_vocab().values()) - special)
        decoded = {tokenizer.decode([token]) for token in used if token not in special}
        longest = sorted(decoded, key=lambda text: (-len(text), text))[:_LONGEST_SHOWN]
        groups = {}
        for group, texts in self.groups.items():
            counts = self.counts[name][group]
            groups[group] = {
                "documents": texts.documents,
                "bytes": texts.bytes,
                "tokens": counts.tokens,
                "bytes_per_token": texts.bytes / max(1, counts.tokens),
                "characters_per_token": texts.characters / max(1, counts.tokens),
                "tokens_per_word": counts.tokens / max(1, texts.words),
                "changed_documents": counts.changed,
                "composed_documents": counts.composed,
            }
        return {
            "vocab_size": vocabulary_size(tokenizer),
            "unused_share": 1 - len(used.keys() - special) / size,
            "longest_tokens": longest,
            "groups": groups,
        }


def measure(tokenizers: Mapping[str, PreTrainedTokenizerFast], texts: Iterable[tuple[str, str]]) -> Measured:
    """Encodes texts with each of the tokenizers.

    Args:
        tokenizers: by name.
        texts: each with its group's name; read once, a mebibyte at a time in memory.

    Raises:
        UserError: a text that is no Unicode.
    """
    found = Measured(tokenizers)
    found.counts = {name: {} for name in tokenizers}
    found.used = {name: Counter() for name in tokenizers}
    for group, some in _batches(texts):
        totals = found.groups.setdefault(group, Group())
        totals.documents += len(some)
        totals.bytes += sum(len(text.encode()) for text in some)
        totals.characters += sum(map(len, some))
        totals.words += sum(len(text.split()) for text in some)
        for name, tokenizer in tokenizers.items():
            _count(found.counts[name].setdefault(group, Counts()), found.used[name], tokenizer, some)
    return found


def _count(counts: Counts, used: Counter[int], tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    decoded = tokenizer.batch_decode(encoded, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for text, ids, back in zip(texts, encoded, decoded, strict=True):
        counts.tokens += len(ids)
        used.update(ids)
        if back != text:
            composed = back == unicodedata.normalize("NFC", text)
            counts.composed += composed
            counts.changed += not composed


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Texts of one group together, as they come."""
    held: dict[str, list[str]] = {}
    sizes: Counter[str] = Counter()
    for group, text in texts:
        for one in unicode_only([text]):
            held.setdefault(group, []).append(one)
            sizes[group] += len(one)
        if sizes[group] >= _AT_ONCE:
            del sizes[group]
            yield group, held.pop(group)
    yield from held.items()


def write(measured: Measured, folder: Path) -> None:
    """Writes measure.json and measure.png."""
    figures = measured.as_dict()
    write_json(folder / "measure.json", figures)
    draw(figures, folder / "measure.png")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What paths and globs are called beside each other: their ends, if those differ."""
    whole = list(names)
    ends = [name.rstrip("/").rpartition("/")[2] or name for name in whole]
    return dict(zip(whole, ends if len(set(ends)) == len(ends) else whole, strict=True))


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draws the bytes of a token, groups side by side with a bar for each tokenizer, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = list(next(iter(figures.values()))["groups"])
    bars, names = len(groups) * len(figures), short_names(figures)
    figure = Figure(figsize=(max(6.0, min(16.0, 2 + 0.5 * bars)), 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(figures)
    for i, (name, found) in enumerate(figures.items()):
        places = [group + (i - (len(figures) - 1) / 2) * width for group in range(len(groups))]
        heights = [found["groups"][group]["bytes_per_token"] for group in groups]
        drawn = axes.bar(places, heights, width * 0.92, color=colormaps["tab10"](i % 10))
        # Names are no formulas, and a leading underscore hides nothing.
        drawn.set_label(f"\u200b{names[name]} ({found['vocab_size']:,} tokens)".replace("$", r"\$"))
        axes.bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), short_names(groups).values(), parse_math=False)
    axes.set_ylabel("bytes/token")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png")
