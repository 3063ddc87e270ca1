import sys
from collections.abc import Callable

import pytest

from motifarch.data.documents import Document, Filtered, Found, Noticed
from motifarch.data.duplicates import NearDuplicates
from motifarch.data.languages import InLanguages
from motifarch.errors import UserError

TEXTS = {
    "ko": "이 문서는 데이터를 준비하는 방법을 설명합니다. 파일을 읽고 토큰으로 나눕니다.",
    "en": "This document explains how to prepare data: files are read, split into tokens and packed into blocks.",
    "de": "Dieses Dokument erklärt, wie man Daten vorbereitet: Dateien werden gelesen und in Blöcke gepackt.",
    "ja": "この文書では、データを準備する方法を説明します。ファイルを読み込んで、トークンに分けます。",
    "short": "네, OK!",
}


def run(*languages: str) -> list[Found]:
    return list(InLanguages(languages)(Document(name, text) for name, text in TEXTS.items()))


def test_other_languages_are_left_out_and_what_is_too_short_stays() -> None:
    found = run("ko", "en")
    assert [one.name for one in found if isinstance(one, Document)] == ["ko", "en", "short"]
    assert {one.name: one.reason[:5] for one in found if isinstance(one, Filtered)} == {"de": "in de", "ja": "in ja"}
    assert [one.name for one in found if isinstance(one, Noticed)] == ["short"]


def test_a_long_document_is_told_by_all_of_it() -> None:
    text = "<div>" * 1000 + TEXTS["ko"] * 400
    (found,) = InLanguages(["ko"])([Document("page", text)])
    assert isinstance(found, Document)


def test_a_language_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match=r"--languages korean: take of .*\bko\b"):
        run("korean")


@pytest.mark.parametrize(
    ("package", "make"), [("py3langid", lambda: InLanguages(["ko"])), ("datasketch", lambda: NearDuplicates(0.8))]
)
def test_a_missing_package_is_named(package: str, make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'pip install "motifarch\[data\]"'):
        make()
