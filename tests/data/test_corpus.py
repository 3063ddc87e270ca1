from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motifarch.data.corpus import Corpus, read_corpus, shuffled
from motifarch.data.documents import Document, ReadOptions, Skipped, Tally
from motifarch.data.settings import PrepareSettings
from motifarch.errors import UserError


class Texts:
    """A source of given texts; None is skipped."""

    def __init__(self, texts: list[str | None]) -> None:
        self.texts = texts

    def state(self) -> dict[str, Any]:
        return {"name": "texts"}

    def documents(self, options: ReadOptions) -> Iterator[Document | Skipped]:
        for number, text in enumerate(self.texts):
            yield Skipped(str(number), "empty") if text is None else Document(str(number), text)


Read = Callable[..., Corpus]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(*sources: list[str | None], log: Tally | None = None, **options: Any) -> Corpus:
        settings = PrepareSettings(sources=("texts",), output=tmp_path, **options)
        return read_corpus(
            tmp_path, settings, [Texts(texts) for texts in sources], skipped=log or Tally(), noticed=Tally()
        )

    return read


def split(corpus: Corpus) -> dict[str, set[str]]:
    sides: dict[str, set[str]] = {"train": set(), "validation": set()}
    for row in corpus.rows:
        sides[corpus.split_of(row["split_hash"])].add(row["text"])
    return sides


def test_the_split_has_about_its_share_and_repeats(read: Read) -> None:
    texts = [f"text {i}" for i in range(2000)]
    sides = split(read(texts, validation_fraction=0.1))
    assert 140 <= len(sides["validation"]) <= 260
    assert split(read(texts, validation_fraction=0.1)) == sides
    assert split(read(texts, validation_fraction=0.1, seed=1)) != sides


def test_a_document_keeps_its_side_when_others_come_or_move(read: Read) -> None:
    texts = [f"text {i}" for i in range(500)]
    before = split(read(texts))["validation"]
    after = split(read(texts[::-1] + [f"new {i}" for i in range(500)]))["validation"]
    assert before == {text for text in after if text.startswith("text")}


def test_copies_are_on_one_side(read: Read) -> None:
    sides = split(read([f"text {i % 50}" for i in range(500)], validation_fraction=0.5))
    assert not sides["train"] & sides["validation"]


@pytest.mark.parametrize("fraction", [1e-12, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("number", [2, 3, 10])
def test_no_side_is_empty(read: Read, fraction: float, number: int) -> None:
    sides = split(read([f"text {i}" for i in range(number)], validation_fraction=fraction))
    assert sides["train"]
    assert sides["validation"]


def test_what_cannot_be_split_is_refused(read: Read) -> None:
    with pytest.raises(UserError, match="there is one document"):
        read(["alone"])
    with pytest.raises(UserError, match="all 3 documents hold the same text"):
        read(["same", "same", "same"])
    with pytest.raises(UserError, match=r"no document is left of texts; skipped: 2 empty \(0, 1\)"):
        read([None, None])


def test_skipping_and_strict(read: Read) -> None:
    log = Tally()
    assert len(read(["one", None, "two"], log=log).rows) == 2
    assert log.as_dict() == {"count": 1, "reasons": {"empty": {"count": 1, "names": ["1"]}}}
    with pytest.raises(UserError, match=r"--strict: 1 is skipped \(empty\)"):
        read(["one", None, "two"], strict=True)


def test_max_documents_counts_each_sources_own(read: Read) -> None:
    corpus = read(["a", None, "b", "c"], ["d", "e", "f"], max_documents=2)
    assert corpus.rows["text"][:] == ["a", "b", "d", "e"]


def test_content_hash_follows_the_text(read: Read) -> None:
    hashes = [read(texts).content_hash for texts in (["a", "b"], ["b", "a"], ["a", "c"], ["ab", ""])]
    assert len(set(hashes)) == 4
    assert read(["a"], ["b"]).content_hash == hashes[0]


def test_shuffled_gives_every_document_once(read: Read) -> None:
    texts = [f"text {i}" for i in range(300)]
    corpus = read(texts)
    order = [text.as_py() for text, _ in shuffled(corpus.rows, 0, "text")]
    assert sorted(order) == sorted(texts)
    assert order != texts
    assert order != [text.as_py() for text, _ in shuffled(corpus.rows, 1, "text")]
    training = list(corpus.training_texts(0))
    assert set(training) == split(corpus)["train"]
    assert training == [text for text in order if text in set(training)]
