import pytest

from motifarch.data.documents import Document, Skipped, Tally, document, printable


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"plain", "plain"), ("λ".encode(), "λ"), (b"\xef\xbb\xbfmarked", "marked"), ("a record", "a record")],
)
def test_text_is_accepted(content: bytes | str, text: str) -> None:
    assert document("name", content) == Document("name", text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        ("", "empty"),
        (b"\x7fELF\0\1", "binary"),
        ("a\0b", "binary"),
        ("caf\xe9".encode("latin-1"), "not UTF-8"),
        ("\ud800", "not valid Unicode"),
        (None, "no text"),
        (3, "no text"),
    ],
)
def test_other_content_is_skipped_with_its_reason(content: object, reason: str) -> None:
    assert document("name", content) == Skipped("name", reason)


def test_log_counts_all_and_names_some() -> None:
    log = Tally()
    for number in range(250):
        log.add(f"file{number}", "empty")
    log.add("odd", "binary")
    assert log.summary() == "250 empty (file0, file1, file2, ...); 1 binary (odd)"
    assert log.as_dict()["count"] == 251
    assert log.as_dict()["reasons"]["empty"]["count"] == 250
    assert log.as_dict()["reasons"]["empty"]["names"] == [f"file{number}" for number in range(100)]


def test_names_can_be_printed_whatever_their_bytes() -> None:
    odd = "한/a.txt".encode("cp949").decode("utf-8", "surrogateescape")
    assert printable(odd) == printable(printable(odd)) == r"\xc7\xd1/a.txt"
    # As Python reads a name where the locale knows ASCII alone.
    assert printable("한.txt".encode().decode("ascii", "surrogateescape")) == printable("한.txt") == "한.txt"
