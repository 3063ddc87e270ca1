"""New tokens for a vocabulary that exists."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import regex  # type: ignore[import-untyped]
from tokenizers import Tokenizer, models

from motifarch.errors import UserError
from motifarch.tokenizer.merges import MergeLearner
from motifarch.tokenizer.train import unicode_only

# Bytes that begin a character of three bytes in these scripts, for tokens that are parts of one.
_FIRST_BYTES = {"Hangul": range(0xE1, 0xEE), "Han": range(0xE2, 0xF1), "Hiragana": range(0xE3, 0xE4)}


def extend(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    tokens: int,
    *,
    script: str | None = None,
    progress: Callable[[Iterable[str], int], Iterable[str]] = lambda merges, total: merges,
) -> tuple[Tokenizer, list[tuple[str, str]]]:
    """A copy with more tokens, which byte-pair encoding goes on to learn on texts.

    Old ids stay. New merges come after all old ones: a text in which none of them applies has the
    tokens that it had, and any other those of the old tokenizer, some of them joined.

    Args:
        tokenizer: a byte-level BPE.
        texts: read once. Memory grows with how many of their words differ.
        tokens: how many new ones; little text gives fewer.
        script: of the new tokens' letters, by its Unicode name, such as "Hangul"; other text then
            keeps its tokens. None for any.
        progress: see :func:`~motifarch.tokenizer.superbpe.train_superbpe`.

    Returns:
        The new tokenizer, and the merges that are new.

    Raises:
        UserError: the tokenizer is no byte-level BPE; a text that is no Unicode; a script that is
            not known.
    """
    content = json.loads(tokenizer.to_str())
    _check(tokenizer, content)
    may_become = _of_script(script, content)
    strings = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    known, first = set(strings.values()), max(strings) + 1

    def may_merge(left: int, right: int) -> bool:
        token = strings[left] + strings[right]
        return token not in known and may_become(token)

    merges: list[tuple[str, str]] = []

    def learn() -> Iterator[str]:
        learner = MergeLearner(_words(tokenizer, texts), may_merge)
        for (left, right), _ in itertools.islice(learner.merges(first), tokens):
            token = strings[left] + strings[right]
            merges.append((strings[left], strings[right]))
            strings[first + len(merges) - 1] = token
            known.add(token)
            yield token

    for _ in progress(learn(), tokens):
        pass
    model = content["model"]
    # Added tokens get the ids after the model's, unless the model has them: so they keep theirs.
    model["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    model["vocab"] |= {left + right: first + i for i, (left, right) in enumerate(merges)}
    model["merges"] += [list(pair) for pair in merges]
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False)), merges


def _check(tokenizer: Tokenizer, content: dict[str, object]) -> None:
    model = content["model"]
    assert isinstance(model, dict)
    if not isinstance(tokenizer.model, models.BPE):
        raise UserError(f"the tokenizer is a {model['type']}: only a byte-level BPE can go on merging")
    if "ByteLevel" not in json.dumps(content["pre_tokenizer"]):
        raise UserError(
            "the tokenizer's BPE is not of bytes (ByteLevel): give one that is, as o200k_base or Qwen's are"
        )


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[list[int], int]]:
    """The present tokens of each word, and how often it is there."""
    seen: Counter[str] = Counter()
    normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
    for text in unicode_only(texts):
        composed = text if normalizer is None else normalizer.normalize_str(text)
        seen.update(word for word, _ in splitter.pre_tokenize_str(composed))
    for word, times in seen.items():
        ids = [token.id for token in tokenizer.model.tokenize(word)]
        if len(ids) > 1:
            yield ids, times


def _of_script(script: str | None, content: dict[str, object]) -> Callable[[str], bool]:
    """Whether a token is of a script: its letters, a space before them, or parts of a letter."""
    if script is None:
        return lambda token: True
    try:
        if not script.isidentifier():  # more than a name would be more of a pattern
            raise regex.error("no name")
        of_script = regex.compile(rf" ?\p{{Script={script}}}*")
    except (regex.error, ValueError, OverflowError):  # the last two of what looks like a number
        raise UserError(
            f"--script {script!r} is no script of Unicode: give one such as Hangul, Han, Cyrillic"
        ) from None
    to_byte = _bytes_of_characters()
    first_bytes = _FIRST_BYTES.get(script, range(0xC2, 0xF5))

    def may_become(token: str) -> bool:
        raw = bytes(to_byte[character] for character in token)
        whole = raw.decode(errors="ignore")
        if not of_script.fullmatch(whole):
            return False
        begins = [byte for byte in raw if byte >= 0xC0]
        return all(byte in first_bytes for byte in begins) and any(byte >= 0x80 for byte in raw)

    return may_become


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    # The printable ones of Latin-1 stand for themselves, the others follow from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
