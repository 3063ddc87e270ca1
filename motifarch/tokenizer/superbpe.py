"""SuperBPE: a second stage of merges that goes on across spaces.

Source: Liu et al., "SuperBPE: Space Travel for Language Models", arXiv 2503.13423. Stage 1 learns
merges within words. Stage 2 keeps them, as the first, and goes on in whole lines, up to a number of
words. As there, numbers stay groups of digits. Of ours: no token ends with a space, so that a
prompt that ends with a word has the tokens that text has.
"""

import heapq
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from motifarch.tokenizer.merges import MergeLearner
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.split_pattern import LINES
from motifarch.tokenizer.train import check_vocab_size, pieces, split_by, train_bpe

_SPACE = "Ġ"  # in the alphabet of byte-level tokens


@dataclass
class Sample:
    """A uniform sample of a stream's text, of bounded size.

    Args:
        characters: how many it holds at most.
        seed: of the choice.
    """

    characters: int
    seed: int = 0
    _held: list[tuple[float, int, str]] = field(default_factory=list, repr=False)
    _size: int = 0

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts again, of which some pieces are kept."""
        draw, number = random.Random(self.seed), itertools.count()
        for text in texts:
            for piece in pieces(text):
                # Those with the smallest numbers are held; the heap has the largest of these first.
                heapq.heappush(self._held, (-draw.random(), next(number), piece))
                self._size += len(piece)
                while self._size > self.characters and len(self._held) > 1:
                    self._size -= len(heapq.heappop(self._held)[2])
            yield text

    @property
    def pieces(self) -> list[str]:
        """What is held, in the order of the stream."""
        return [piece for _, _, piece in sorted(self._held, key=lambda held: held[1])]


def train_superbpe(
    texts: Iterable[str],
    vocab_size: int,
    special: SpecialTokens,
    *,
    stage_1_size: int,
    max_words: int = 4,
    sample_characters: int = 10_000_000,
    seed: int = 0,
    progress: Callable[[Iterable[str], int], Iterable[str]] = lambda merges, total: merges,
) -> Tokenizer:
    """A byte-level BPE of words and runs of words.

    Args:
        texts: read once, for stage 1; a sample of them serves stage 2.
        vocab_size: tokens in all.
        special: the first tokens.
        stage_1_size: tokens, of them, that stage 1 makes: bytes and special ones too.
        max_words: of a token, counted by spaces.
        sample_characters: of the sample; stage 2 takes some 100 bytes of memory for each.
        seed: of the sample.
        progress: what shows how many of stage 2's tokens there are: given these and their number,
            gives them again.

    Raises:
        UserError: no room for the bytes and special tokens; a text that is no Unicode.
    """
    check_vocab_size(stage_1_size, special)
    sample = Sample(sample_characters, seed)
    words = train_bpe(sample.watch(texts), stage_1_size, special)
    lines = _with_pattern(words, LINES)
    known = {token: number for token, number in words.get_vocab().items() if token not in special.tokens}
    tokens = dict.fromkeys(range(words.get_vocab_size()), "") | {number: token for token, number in known.items()}

    def may_merge(left: int, right: int) -> bool:
        token = tokens[left] + tokens[right]
        apart = token.replace(_SPACE, " ")
        return (
            token not in known and (not apart.rstrip() or not apart.endswith(" ")) and len(apart.split()) <= max_words
        )

    added: list[tuple[str, str]] = []

    def learn() -> Iterator[str]:
        learner = MergeLearner(_sequences(lines, sample.pieces).items(), may_merge)
        for (left, right), _ in itertools.islice(learner.merges(len(tokens)), vocab_size - len(tokens)):
            token = tokens[left] + tokens[right]
            added.append((tokens[left], tokens[right]))
            tokens[len(tokens)], known[token] = token, len(tokens)
            yield token

    for _ in progress(learn(), vocab_size - len(tokens)):
        pass
    return with_merges(lines, added)


def _sequences(tokenizer: Tokenizer, texts: list[str]) -> Counter[tuple[int, ...]]:
    """The tokens of each line, and how often it is there."""
    found: Counter[tuple[int, ...]] = Counter()
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        pairs = zip(encoding.word_ids, encoding.ids, strict=True)
        for _, line in itertools.groupby(pairs, key=lambda pair: pair[0]):
            ids = tuple(token for _, token in line)
            if len(ids) > 1:
                found[ids] += 1
    return found


def _with_pattern(tokenizer: Tokenizer, pattern: str) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.pre_tokenizer = split_by(pattern)
    return copy


def with_merges(tokenizer: Tokenizer, merges: Iterable[tuple[str, str]]) -> Tokenizer:
    """A copy of a BPE with further merges after its own, whose tokens get the next ids."""
    content = json.loads(tokenizer.to_str())
    model, size = content["model"], tokenizer.get_vocab_size(with_added_tokens=True)
    for left, right in merges:
        model["merges"].append([left, right])
        model["vocab"][left + right] = size
        size += 1
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
