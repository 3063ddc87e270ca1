"""Numbers with their nouns."""

from motifarch.counted import counted


def test_nouns_agree_with_their_numbers() -> None:
    assert counted(1, "document") == "1 document"
    assert counted(0, "document of one line") == "0 documents of one line"
    assert counted(2000, "process") == "2,000 processes"
