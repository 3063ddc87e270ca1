"""Documents in the languages that were asked for."""

from collections.abc import Iterable, Iterator, Sequence

from motifarch.data.documents import Document, Filtered, Found, Noticed
from motifarch.errors import UserError

_LEAST_BYTES = 60
"""Of letters, in UTF-8: twenty Korean syllables, sixty English letters."""
_PIECE = 4096
"""Characters that are looked at in the beginning, the middle and the end."""


class InLanguages:
    """Leaves out documents in other languages, by py3langid; what is too short to tell is kept.

    Args:
        languages: their ISO 639-1 codes, such as ko.

    Raises:
        UserError: a language is not known, or py3langid is not installed.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        try:
            import py3langid
        except ImportError:
            raise UserError('--languages needs py3langid: pip install "motifarch[data]"') from None
        known = sorted(language for language, _ in py3langid.rank(""))
        for language in languages:
            if language not in known:
                raise UserError(f"--languages {language}: take of {', '.join(known)}")
        self._classify = py3langid.classify
        self._languages = set(languages)

    def __call__(self, found: Iterable[Found]) -> Iterator[Found]:
        """The same, without them."""
        for one in found:
            if not isinstance(one, Document):
                yield one
                continue
            sample = _sample(one.text)
            if len("".join(filter(str.isalpha, sample)).encode()) < _LEAST_BYTES:
                yield Noticed(one.name, "document too short to tell its language, kept")
            elif (language := self._classify(sample)[0]) not in self._languages:
                yield Filtered(one.name, f"in {language}, which --languages has not")
                continue
            yield one


def _sample(text: str) -> str:
    if len(text) <= 3 * _PIECE:
        return text
    middle = len(text) // 2
    return " ".join((text[:_PIECE], text[middle : middle + _PIECE], text[-_PIECE:]))
