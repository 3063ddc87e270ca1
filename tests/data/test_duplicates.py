"""Near duplicates are found in Korean as in English, and what differs stays."""

import random
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from motifarch.data.documents import Document, Filtered, Found, Skipped
from motifarch.data.duplicates import ExactDuplicates, NearDuplicates

_KOREAN = (
    ("우리 회사는", "그 연구자는", "새로운 도서관은", "작은 마을의 시장은", "서울의 지하철은"),
    ("매주 토요일 아침에", "긴 회의를 마친 뒤에", "예산이 부족한 가운데", "뜻밖의 손님 때문에", "여러 해 동안"),
    ("새로운 계획을 발표했다", "낡은 건물을 고쳤다", "값을 크게 올렸다", "아무 말도 하지 않았다", "길을 넓혔다"),
)


def korean(seed: int, sentences: int = 12) -> list[str]:
    chosen = random.Random(seed)
    return [
        " ".join(chosen.choice(part) for part in _KOREAN) + f" {chosen.randrange(999)}번." for _ in range(sentences)
    ]


def run(step: Callable[[Iterable[Found]], Iterator[Found]], texts: Iterable[str]) -> list[Found]:
    return list(step(Document(str(number), text) for number, text in enumerate(texts)))


def left_out(found: list[Found]) -> dict[str, str]:
    return {one.name: one.detail for one in found if isinstance(one, Filtered)}


def jaccard(first: str, second: str) -> float:
    shingles = [{text[n : n + 8] for n in range(len(text) - 7)} for text in (first, second)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def real_documents() -> list[str]:
    """Modules of the standard library: 200 texts with licences and idioms in common."""
    library = Path(sysconfig.get_path("stdlib"))
    folders = (library, *(library / name for name in ("asyncio", "email", "importlib", "multiprocessing", "unittest")))
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    texts = [path.read_text("utf-8", errors="replace")[:20_000] for path in files]
    return [text for text in texts if len(text) > 500][:200]


def test_a_changed_sentence_of_korean_is_a_near_duplicate() -> None:
    sentences = korean(1)
    changed = [*sentences[:5], "이 문장은 원래의 글에 전혀 없던 말이다.", *sentences[6:]]
    decomposed = unicodedata.normalize("NFD", "\n".join(sentences))
    texts = [" ".join(sentences), " ".join(changed), decomposed, *(" ".join(korean(seed)) for seed in range(2, 30))]
    assert left_out(run(NearDuplicates(0.7), texts)) == {"1": "of 0", "2": "of 0"}


def test_a_changed_sentence_of_english_is_a_near_duplicate(make_text: Callable[..., str]) -> None:
    text = (Path(sysconfig.get_path("stdlib")) / "this.py").read_text()
    texts = [text, text.replace("\n", "\r\n  "), text.replace("import", "never import"), make_text(1)]
    assert set(left_out(run(NearDuplicates(0.8), texts))) == {"1", "2"}


def test_real_documents_that_differ_all_stay() -> None:
    texts = real_documents()
    assert len(texts) == 200
    found = left_out(run(NearDuplicates(0.8), texts))
    assert found == {}


def test_the_threshold_is_the_share_of_common_shingles() -> None:
    base = " ".join(korean(3, 60))
    for cut in (0.1, 0.2, 0.3, 0.5, 0.7):
        other = base[: int(len(base) * (1 - cut))] + " ".join(korean(4, 60))[: int(len(base) * cut)]
        share = jaccard(base, other)
        assert left_out(run(NearDuplicates(max(0.05, share - 0.12)), [base, other])), (cut, share)
        assert not left_out(run(NearDuplicates(min(1.0, share + 0.12)), [base, other])), (cut, share)


def test_the_order_alone_decides_which_stays() -> None:
    texts = [text for seed in range(40) for text in (" ".join(korean(seed)), " ".join(korean(seed)) + " 끝.")]
    random.Random(0).shuffle(texts)
    first, again = (left_out(run(NearDuplicates(0.8), texts)) for _ in range(2))
    assert first == again
    assert len(first) == 40
    assert all(int(name) > int(detail.removeprefix("of ")) for name, detail in first.items())


@pytest.mark.parametrize("text", ["한", "a b", "\U0001f600", "x" * 3_000_000])
def test_texts_of_any_length(text: str) -> None:
    found = run(NearDuplicates(0.8), [text, text, "다른 글이 여기에 있다."])
    assert set(left_out(found)) == {"1"}


def test_exact_duplicates_are_the_same_text() -> None:
    step = ExactDuplicates()
    first = list(step([Document("a", "글"), Document("b", "글 "), Skipped("c", "empty"), Document("d", "글")]))
    assert [one.name for one in first if isinstance(one, Document)] == ["a", "b"]
    assert first[2:] == [Skipped("c", "empty"), Filtered("d", "duplicate")]
    assert list(step([Document("e", "글 ")])) == [Filtered("e", "duplicate")]  # of an earlier source
