"""The retrieval probe: lines in their places, scores that tell abilities apart."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.models import random_ids, tiny_model
from helpers.tiny import prepare_text
from motifarch.data import PackedDataset
from motifarch.errors import UserError
from motifarch.study.measure_options import DEPTHS
from motifarch.study.probe import Answers, ask, find_lines, make_questions, model_scorer, probe
from motifarch.tokenizer.loading import load_tokenizer

LENGTH = 160


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PackedDataset:
    return PackedDataset.open(prepare_text(tmp_path_factory.mktemp("probe")), "validation")


@pytest.fixture(scope="module")
def tokenizer(data):
    return load_tokenizer(data.folder / "tokenizer")


@pytest.fixture(scope="module")
def lines(tokenizer, data):
    return find_lines(tokenizer, data)


class Model:
    """Answers with log-probabilities as a model of known abilities would."""

    def __init__(self, lines, vocab_size: int, noise: float = 0.0):
        self.lines, self.vocab_size = lines, vocab_size
        self.generator = torch.Generator().manual_seed(0)
        self.noise = noise

    def __call__(self, contexts: Tensor, questions: Tensor) -> Tensor:
        logits = torch.randn(*questions.shape[:2], self.vocab_size, generator=self.generator) * self.noise
        for row, tokens in enumerate(contexts.tolist()):
            found = self.read(tokens)
            for i, question in enumerate(questions[row].tolist()):
                logits[row, i, self.chosen(found, question[len(self.lines.head)])] += 8.0
        return logits.log_softmax(-1)

    def read(self, tokens: list[int]) -> dict[int, int]:
        """Names and their values, in order."""
        lines, found = self.lines, {}
        for start in range(len(tokens)):
            name = tokens[start + len(lines.head)] if start + len(lines.head) < len(tokens) else -1
            question = lines.question(name)
            if tokens[start : start + len(question)] == question and start + len(question) < len(tokens):
                found[name] = tokens[start + len(question)]
        return found

    def chosen(self, found: dict[int, int], name: int) -> list[int]:
        return [found[name]]


class Bag(Model):
    """Knows what values there are, and not whose they are."""

    def chosen(self, found, name):
        return list(found.values())


class Latest(Model):
    """Repeats the last value, whatever is asked."""

    def chosen(self, found, name):
        return [list(found.values())[-1]]


class Blind(Model):
    """Sees the question alone, and always prefers the same word."""

    def chosen(self, found, name):
        return [self.lines.words[0]]


def run(kind, lines, data, noise: float = 0.0, samples: int = 40):
    score = kind(lines, data.vocab_size, noise)
    return probe(score, lines, [data], lengths=[LENGTH, 2 * LENGTH], samples=samples, seed=3)


def test_lines_are_as_the_tokenizer_writes_them(lines, tokenizer):
    assert len(set(lines.words)) == len(lines.words) >= 3 * len(DEPTHS)
    for name, value in zip(lines.words[:20], lines.words[1:21], strict=True):
        a, b = tokenizer.decode([name]), tokenizer.decode([value])
        assert a.isalpha()
        assert lines.whole(name, value) == tokenizer(f'\n{a} = "{b}"\n', add_special_tokens=False).input_ids


def test_a_line_at_each_depth_in_text_of_the_validation_split(lines, data, tokenizer):
    depths = (0.0, 0.25, 0.8, 1.0)
    questions = make_questions(lines, [data], length=LENGTH, pairs=3, seed=0, depths=depths)
    assert questions.contexts.shape[-1] + questions.questions.shape[-1] == LENGTH
    text = [t for row in range(len(data)) for t in data[row].input_ids[:-1].tolist() if t != data.eos_token_id]
    text = tokenizer.decode(text + text)
    for pair in range(3):
        names = questions.questions[pair, :, len(lines.head)].tolist()
        assert questions.questions[pair].tolist() == [lines.question(name) for name in names]
        for twin in range(2):
            filler, before = questions.contexts[pair, twin].tolist(), []
            held = Model(lines, 0).read(filler)
            assert [held[name] for name in names] == questions.values[pair, twin].tolist()
            for name in names:  # from the front: what is before a line is filler by then
                line = lines.whole(name, held[name])
                before.append(next(i for i in range(len(filler)) if filler[i : i + len(line)] == line))
                del filler[before[-1] : before[-1] + len(line)]
            assert before == [round(depth * len(filler)) for depth in depths]
            assert tokenizer.decode(filler) in text
        assert len({*names, *questions.values[pair].flatten().tolist()}) == 3 * len(depths)
        differs = questions.contexts[pair, 0] != questions.contexts[pair, 1]
        assert int(differs.sum()) == len(depths)  # the values, and nothing else


def test_questions_depend_on_the_seed_alone(lines, data):
    one, again, other = (make_questions(lines, [data], length=LENGTH, pairs=2, seed=s) for s in (0, 0, 1))
    for name in ("contexts", "questions", "values"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert not torch.equal(one.values, other.values)


@pytest.mark.parametrize(
    ("kind", "accuracy", "gain", "binding"),
    [
        (Model, 1, 8, 8),
        (Bag, 0.2, 8, 0),  # ties share
        (Latest, [0, 0, 0, 0, 1], [0, 0, 0, 0, 8], 0),
    ],
)
def test_models_of_known_abilities_score_by_them(lines, data, kind, accuracy, gain, binding):
    found = run(kind, lines, data)
    assert (found["lengths"], found["depths"], found["chance"]) == ([LENGTH, 2 * LENGTH], list(DEPTHS), 0.2)
    np.testing.assert_allclose(found["accuracy"], np.broadcast_to(accuracy, (2, 5)))
    np.testing.assert_allclose(found["gain"], np.broadcast_to(gain, (2, 5)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["binding"], binding, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["gain_error"], 0, atol=1e-5)
    if kind is Model:
        np.testing.assert_allclose(found["loss"], np.log(np.exp(8) + data.vocab_size - 1) - 8, rtol=1e-5)


def test_a_model_that_sees_no_context(lines, data):
    found = run(Blind, lines, data)
    assert abs(found["overall"]["accuracy"] - 0.2) < 0.02
    for name in ("gain", "binding"):
        np.testing.assert_allclose(found[name], 0, atol=1e-6)


def test_a_model_that_guesses_is_at_chance_within_the_errors_given(lines, data):
    """Independent log-probabilities of standard deviation 1, of which every error is known."""
    pairs, count = 300, len(DEPTHS)
    noise = torch.randn(pairs, 2, count, 2, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answers = Answers.of(noise.numpy())
    # A mean over two twins of a difference of two draws; and of one draw less the mean of four
    # others.
    for values, variance in ((answers.gain, 1.0), (answers.binding, (1 + 1 / (count - 1)) / 2)):
        np.testing.assert_allclose(values.var(0, ddof=1), variance, rtol=0.35)
        assert abs(values.mean()) < 4 * np.sqrt(variance / values.size)
    assert abs(answers.accuracy.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / (pairs * 2 * count))

    found = run(Blind, lines, data, noise=1.0, samples=60)
    z = np.array(found["gain"]) / np.array(found["gain_error"])
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose(found["gain_error"], np.sqrt(1 / 30), rtol=0.5)
    assert abs(found["overall"]["gain"]) < 4 * found["overall"]["gain_error"]
    # The mean of all cells errs less than a cell: by the square root of their number, as they are
    # independent here.
    assert found["overall"]["gain_error"] == pytest.approx(np.sqrt(1 / 30 / 10), rel=0.4)


def test_the_scores_of_every_twins_words_come_back_in_place(lines, data):
    """A scorer that says who asked and which word it was asked of."""
    questions = make_questions(lines, [data], length=LENGTH, pairs=3, seed=0)
    places = {tuple(ids.tolist()): i for i, ids in enumerate(questions.contexts.flatten(0, 1))}

    def score(contexts: Tensor, asked: Tensor) -> Tensor:
        first = torch.tensor([places[tuple(row.tolist())] for row in contexts]) * 5
        return (first[:, None] + torch.arange(5))[..., None] * 1000.0 + torch.arange(data.vocab_size)

    for batch in (1, 7, 64):
        found = ask(questions, score, rows=batch)
        assert found.shape == (3, 2, 5, 2, 5)
        for pair, twin, name in np.ndindex(3, 2, 5):
            expected = 1000.0 * ((pair * 2 + twin) * 5 + name) + questions.values[pair].numpy()
            np.testing.assert_array_equal(found[pair, twin, name], expected)


def test_contexts_too_short_for_the_lines_are_lengthened(lines, data):
    found = probe(Model(lines, data.vocab_size), lines, [data], lengths=[8, 16], samples=4)
    assert found["lengths"] == [lines.shortest(DEPTHS)]
    assert np.shape(found["accuracy"]) == (1, len(DEPTHS))
    with pytest.raises(ValueError, match="take at least"):
        make_questions(lines, [data], length=lines.shortest(DEPTHS) - 1, pairs=2, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 7}, "samples is 7"),
        ({"depths": (0.5,)}, "at least two"),
        ({"depths": (0.9, 0.1)}, "ascending"),
        ({"depths": (0.5, 1.5)}, "from 0 to 1"),
    ],
)
def test_refuses_what_cannot_be_asked(lines, data, given, message):
    with pytest.raises(UserError, match=message):
        probe(Model(lines, data.vocab_size), lines, [data], lengths=[LENGTH], **given)


@pytest.mark.parametrize("variant", ["gda", "diff_v1", "diff_v2", "softmax", "gda window"])
def test_a_context_read_once_is_answered_as_one_read_with_its_question(variant):
    model = tiny_model(variant)
    contexts, questions = random_ids(3, 40), random_ids(3, 2, 5, seed=2)
    with torch.no_grad():
        found = model_scorer(model)(contexts, questions)
        for row, i in np.ndindex(3, 2):
            whole = torch.cat((contexts[row], questions[row, i]))[None]
            expected = model(whole, use_cache=False).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(found[row, i], expected, atol=1e-4, rtol=1e-4)
