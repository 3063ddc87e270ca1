"""A retrieval probe that needs no training: multi-query associative recall in the form of the text
itself.

Lines ``name = "value"`` stand at given depths of text from the validation split, which ends with
one of the names asked again: ``name = "``. The model should go on with that name's value. Names and
values are words that the run's tokenizer writes as one token, drawn anew for every context, so
nothing can be known but from the context. After "Zoology: Measuring and Improving Recall in
Efficient Language Models" (arXiv 2312.04927) and the needle in a haystack.

Contexts come in twins that differ in nothing but the values, and every name of each is asked. Small
models are often no better than chance at choosing; the paired differences show what they have read
long before:

- gain: the log-probability of the right value, less that of the same word in the twin, where the
  line holds another: whether a value is read out of the context at all;
- binding: the log-probability of the right value, less that of the same word in the same context
  when the other names are asked: whether it is tied to its name.

Both are 0 for a model that sees no further than the question. Nothing but the line's value, or but
the name asked, differs within a pair, so neither a word's frequency nor its place is in the
difference.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from motifarch.data import PackedDataset
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.study.measure_options import DEPTHS
from motifarch.study.speed import fill_cache

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Contexts (N, C), questions (N, P, Q), int64 -> log-probabilities (N, P, V)."""

# Words to draw names and values from, and how many of the tokenizer's are tried for them.
_WORDS = 256
_CANDIDATES = 4096
# Validation rows in which words are counted.
_COUNTED_ROWS = 256


@dataclass(frozen=True)
class Lines:
    """How a tokenizer writes ``\\n`` name ``= "`` value ``"\\n``."""

    head: tuple[int, ...]
    """Tokens before the name."""
    middle: tuple[int, ...]
    """Between name and value."""
    tail: tuple[int, ...]
    """After the value."""
    words: tuple[int, ...]
    """Tokens that can stand for both."""

    def question(self, name: int) -> list[int]:
        """The line up to its value."""
        return [*self.head, name, *self.middle]

    def whole(self, name: int, value: int) -> list[int]:
        """The line."""
        return [*self.question(name), value, *self.tail]

    def shortest(self, depths: Sequence[float]) -> int:
        """Tokens of the shortest context with a line at each of ``depths`` and filler around."""
        question = len(self.question(0))
        return len(depths) * (question + 1 + len(self.tail)) + question + len(depths) + 1


def find_lines(tokenizer: PreTrainedTokenizerBase, data: PackedDataset) -> Lines:
    """Finds the words that a tokenizer writes as one token, wherever a line has them, the commonest
    first.

    Args:
        tokenizer: that of the data.
        data: where words are counted: the first rows of a split.

    Raises:
        UserError: there are too few such words.
    """
    tokens = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    texts = dict(zip(tokens, tokenizer.batch_decode([[token] for token in tokens]), strict=True))
    counts: Counter[int] = Counter()
    for row in range(min(len(data), _COUNTED_ROWS)):
        ids = data[row].input_ids.tolist()
        # Words, and not the ends of longer ones.
        counts.update(b for a, b in pairwise(ids) if not texts.get(a, "")[-1:].isalpha())
    words = [token for token in tokens if texts[token].isalpha()]
    words.sort(key=lambda token: (len(texts[token]) < 3, -counts[token], token))

    forms: defaultdict[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    written = [f'\n{texts[token]} = "{texts[token]}"\n' for token in words[:_CANDIDATES]]
    encoded = tokenizer(written, add_special_tokens=False)["input_ids"] if written else []
    for token, ids in zip(words, encoded, strict=False):
        places = [place for place, found in enumerate(ids) if found == token]
        if len(places) == 2:
            name, value = places
            forms[tuple(ids[:name]), tuple(ids[name + 1 : value]), tuple(ids[value + 1 :])].append(token)
    # Most words leave the rest of the line alone; those that merge with it have forms of their own.
    form = max(forms, key=lambda f: len(forms[f]), default=((), (), ()))
    if len(forms[form]) < 3 * len(DEPTHS):
        raise UserError(
            f"the tokenizer of {data.folder} writes only {len(forms[form])} words as one token in lines name = "
            f'"value", and the retrieval probe draws from at least {3 * len(DEPTHS)}: use a larger vocabulary'
        )
    head, middle, tail = form
    return Lines(head, middle, tail, tuple(forms[form][:_WORDS]))


@dataclass(frozen=True)
class Questions:
    """Twin contexts of one length, each asked for every name in it. (P lines, at P depths.)"""

    contexts: Tensor
    """(pairs, 2, C) int64: of each pair the twins, up to the question."""
    questions: Tensor
    """(pairs, P, Q) int64: each pair's question for every name, up to the value."""
    values: Tensor
    """(pairs, 2, P) int64: what the twins' lines hold, in the order of depth."""


def make_questions(
    lines: Lines,
    datasets: Sequence[PackedDataset],
    *,
    length: int,
    pairs: int,
    seed: int,
    depths: Sequence[float] = DEPTHS,
) -> Questions:
    """Draws questions; the same arguments give the same ones.

    Args:
        lines: from :func:`find_lines`.
        datasets: validation splits, whose text is the filler, without the tokens that end
            documents.
        length: l, tokens up to the value asked for.
        pairs: of twins.
        seed: for names, values and filler.
        depths: p, ascending: how much of the filler comes before each line, from 0 to 1.

    Raises:
        ValueError: ``length`` is less than ``lines.shortest(depths)``, or there are fewer than 3 P
            words.
    """
    count = len(depths)
    if length < lines.shortest(depths):
        raise ValueError(f"length={length}: {count} lines and a question take at least {lines.shortest(depths)} tokens")
    if len(lines.words) < 3 * count:
        raise ValueError(f"{len(lines.words)} words: {count} names and two values for each take {3 * count}")
    rng = np.random.default_rng([seed, length])
    room = length - lines.shortest(depths) + count + 1
    borders = [0, *(round(depth * room) for depth in depths), room]
    contexts, questions, values = [], [], []
    for _ in range(pairs):
        names, *twins = rng.choice(lines.words, (3, count), replace=False).tolist()
        filler = _filler(datasets, rng, room)
        pieces = [filler[a:b] for a, b in pairwise(borders)]
        for held in twins:
            context = list(pieces[0])
            for name, value, piece in zip(names, held, pieces[1:], strict=True):
                context += [*lines.whole(name, value), *piece]
            contexts.append(context)
        questions.append([lines.question(name) for name in names])
        values.append(twins)
    return Questions(torch.tensor(contexts).view(pairs, 2, -1), torch.tensor(questions), torch.tensor(values))


def _filler(datasets: Sequence[PackedDataset], rng: np.random.Generator, count: int) -> list[int]:
    """So many tokens of consecutive rows from a random one on, wrapping around."""
    data = datasets[int(rng.integers(len(datasets)))]
    row, found = int(rng.integers(len(data))), list[int]()
    while len(found) < count:
        ids = data[row % len(data)].input_ids[:-1]  # a row's last token is the next one's first
        found += ids[ids != data.eos_token_id].tolist()
        row += 1
    return found[:count]


@torch.no_grad()
def ask(questions: Questions, score: Scorer, *, rows: int = 8) -> np.ndarray:
    """Puts the questions.

    Args:
        questions: of one length.
        score: the model.
        rows: contexts in one call.

    Returns:
        (pairs, 2, P, 2, P) float64: the log-probability, for each pair, twin and name asked, of the
        words that each twin's lines hold.
    """
    pairs, twins, _ = questions.contexts.shape
    count = questions.questions.shape[1]
    asked = questions.questions.repeat_interleave(twins, dim=0)
    words = questions.values.flatten(1).repeat_interleave(twins, dim=0)
    found = []
    for context, question, wanted in zip(
        questions.contexts.flatten(0, 1).split(rows), asked.split(rows), words.split(rows), strict=True
    ):
        scores = score(context, question)
        found.append(scores.gather(2, wanted.to(scores.device)[:, None].expand(-1, count, -1)).double().cpu())
    return torch.cat(found).view(pairs, twins, count, twins, count).numpy()


@dataclass(frozen=True)
class Answers:
    """What :func:`ask` found, by pair of twins and depth: (pairs, P) float64."""

    accuracy: np.ndarray
    """How often the right value is the likeliest of those in the context; ties share."""
    loss: np.ndarray
    """Nats: less the right value's log-probability, among the whole vocabulary."""
    gain: np.ndarray
    """Nats; see above."""
    binding: np.ndarray
    """Nats; see above."""

    @classmethod
    def of(cls, log_probabilities: np.ndarray) -> "Answers":
        """From :func:`ask`'s result."""
        twin, name = np.arange(2)[:, None], np.arange(log_probabilities.shape[2])[None]
        # Of each twin, what is said of its own values: (pairs, 2, name asked, value).
        own = log_probabilities[:, np.arange(2), :, np.arange(2)].swapaxes(0, 1)
        right = own[:, twin, name, name]
        best = own.max(-1)
        ties = (own == best[..., None]).sum(-1)
        others = (own.sum(2) - right) / max(len(name[0]) - 1, 1)  # of a value, when another name is asked
        return cls(
            accuracy=((right == best) / ties).mean(1),
            loss=-right.mean(1),
            gain=(right - log_probabilities[:, 1 - twin, name, twin, name]).mean(1),
            binding=(right - others).mean(1),
        )


def model_scorer(model: MotifForCausalLM) -> Scorer:
    """The model as :func:`ask` takes it; a context is read once for all questions on it."""

    def score(contexts: Tensor, questions: Tensor) -> Tensor:
        cache = fill_cache(model, contexts.to(model.device))
        cache.batch_repeat_interleave(questions.shape[1])
        ids = questions.flatten(0, 1).to(model.device)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1).unflatten(0, questions.shape[:2])

    return score


def probe(
    score: Scorer,
    lines: Lines,
    datasets: Sequence[PackedDataset],
    *,
    lengths: Sequence[int],
    samples: int = 64,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    rows: int = 8,
    show: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Accuracy, loss, gain and binding by length and depth.

    Args:
        score: the model.
        lines: from :func:`find_lines`.
        datasets: validation splits.
        lengths: tokens up to the value; one too short for the lines is lengthened as far as they
            need.
        samples: contexts of each length, an even number.
        seed: of the questions.
        depths: of the lines, ascending.
        rows: contexts that go through the model at once.
        show: told which length is asked.

    Returns:
        For JSON: task, lengths, depths, samples, chance (of accuracy); accuracy, loss, gain and
        binding as a list of depths for each length; gain_error and binding_error likewise, their
        standard errors over pairs; and overall, a mean and error of each over all lengths and
        depths.
    """
    if samples < 4 or samples % 2:
        raise UserError(f"the probe's samples is {samples}; contexts come in twins: give an even number, at least 4")
    if len(depths) < 2 or sorted({d for d in depths if 0 <= d <= 1}) != list(depths):
        raise UserError(f"the probe's depths are {list(depths)}; give at least two, from 0 to 1, in ascending order")
    lengths = sorted({max(length, lines.shortest(depths)) for length in lengths})
    found = []
    for length in lengths:
        show(f"retrieval probe at {length:,} tokens")
        questions = make_questions(lines, datasets, length=length, pairs=samples // 2, seed=seed, depths=depths)
        found.append(Answers.of(ask(questions, score, rows=rows)))
    result: dict[str, Any] = {
        "task": f'{len(depths)} lines name = "value" in validation text, each name asked again at its end',
        "lengths": lengths,
        "depths": list(depths),
        "samples": samples,
        "chance": 1 / len(depths),
        "overall": {},
    }
    for name in ("accuracy", "loss", "gain", "binding"):
        values = [getattr(answers, name) for answers in found]
        result[name] = [v.mean(0).tolist() for v in values]
        result["overall"][name] = float(np.mean([v.mean() for v in values]))
        # Depths share a context; lengths share nothing.
        errors = [stats.sem(v.mean(1)) for v in values]
        result["overall"][f"{name}_error"] = float(np.sqrt(np.square(errors).sum()) / len(errors))
    for name in ("gain", "binding"):
        result[f"{name}_error"] = [stats.sem(getattr(answers, name)).tolist() for answers in found]
    return result
