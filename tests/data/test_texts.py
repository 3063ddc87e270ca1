"""Texts of sources as a stream: all of them, or by weight."""

from collections import Counter
from pathlib import Path

import pytest

from motifarch.data.texts import TextSettings, texts_of
from motifarch.errors import UserError


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    """A source of 100 texts of 50 characters and an empty one, and one of 400 texts of 25."""
    (tmp_path / "a").mkdir()
    for number in range(100):
        (tmp_path / "a" / f"{number:03}.txt").write_text(f"{number:03} " + "a" * 46)
    (tmp_path / "a" / "empty.txt").write_text("")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "{n:03} {"b" * 21}"}}\n' for n in range(400)))
    return f"files:{tmp_path / 'a'}", f"files:{tmp_path / 'b.jsonl'}"


def test_all_texts_in_order_and_what_is_left_out(sources: tuple[str, str]) -> None:
    settings = TextSettings(sources)
    found = list(texts_of(settings))
    assert [text.source for text in found] == [sources[0]] * 100 + [sources[1]] * 400
    assert [text.text[:3] for text in found[100:]] == [f"{n:03}" for n in range(400)]
    assert settings.skipped.counts == {"empty": 1}
    assert list(texts_of(TextSettings(sources))) == found


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 4.0)])
def test_characters_are_in_proportion_to_weights(sources: tuple[str, str], weights: tuple[float, float]) -> None:
    settings = TextSettings(sources, weights)
    characters: Counter[str] = Counter()
    for text in texts_of(settings):
        characters[text.source] += len(text.text)
        first, second = (characters[s] / w for s, w in zip(sources, weights, strict=True))
        assert abs(first - second) <= 50 / min(weights)
    # It ends with the source that ends first, and says so.
    ended = sources[weights[1] > 2]
    assert characters[ended] in (5000, 10000)
    assert any(note.startswith(f"{ended} ended first") for note in settings.notes)


def test_so_many_characters_and_no_more(sources: tuple[str, str]) -> None:
    settings = TextSettings(sources, max_characters=1234)
    assert sum(len(text.text) for text in texts_of(settings)) == 1234
    assert settings.notes  # the second source was not read
    settings = TextSettings(sources, (1.0, 1.0), max_characters=1234)
    assert {text.source for text in texts_of(settings)} == set(sources)
    assert not settings.notes


def test_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no text in"):
        list(texts_of(TextSettings((f"files:{tmp_path / 'empty.txt'}",))))
