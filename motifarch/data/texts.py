"""Texts of sources as a stream: what vocabularies are trained on and measured with."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from motifarch.data.documents import Document, Noticed, ReadOptions, Tally, parts, printable
from motifarch.data.settings import check_reading
from motifarch.data.sources import each_file_once, parse_source
from motifarch.errors import UserError


class Text(NamedTuple):
    """A document's text, or a part of a long one's."""

    source: str  # as --source has it
    name: str
    text: str


@dataclass(frozen=True)
class TextSettings:
    """The options of sources; the commands' help explains them."""

    sources: tuple[str, ...]
    weights: tuple[float, ...] = ()
    """One for each source, or none for all documents of all sources, one source after the other."""
    text_field: str = "text"
    encoding: str = "utf-8"
    document_separator: str | None = None
    hf_split: str = "train"
    max_documents: int | None = None
    max_characters: int | None = None
    skipped: Tally = field(default_factory=Tally, compare=False)
    """What was left out, with the reasons; filled as texts are read."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What else was not read, and why, a line each; filled as texts are read."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the option.
        """
        if not self.sources:
            raise UserError("no --source: take stdlib, files:GLOB or hf:NAME[:CONFIG]")
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(
                f"{len(self.weights)} --weight for {len(self.sources)} --source: give one for each source, in the same "
                "order, or none"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise UserError(f"--weight {min(self.weights)}: it must be above 0")
        check_reading(self.encoding, self.document_separator)


def texts_of(settings: TextSettings) -> Iterator[Text]:
    """All texts of the sources, read as they are asked for.

    With weights, texts of several sources take turns, so that each source has given characters in
    proportion to its weight; the first source that ends, ends the reading.

    Raises:
        UserError: an option, a source that cannot be read, or no text in any.
    """
    settings.check()
    read = _read(settings) if not settings.weights else _take_turns(settings)
    left, any_text = settings.max_characters, False
    for text in read:
        any_text = True
        if left is None:
            yield text
            continue
        yield text._replace(text=text.text[:left])
        left -= len(text.text)
        if left <= 0:
            after = settings.sources[settings.sources.index(text.source) + 1 :]
            if after and not settings.weights:
                settings.notes.append(
                    f"--max-characters {settings.max_characters:,} left nothing for "
                    f"{', '.join(map(printable, after))}: with a --weight for each source they take turns"
                )
            return
    if not any_text:
        reasons = f"; skipped: {settings.skipped.summary()}" if settings.skipped.counts else ""
        names = ", ".join(map(printable, settings.sources))
        raise UserError(f"no text in {names}{reasons}: give sources that hold text")


def _streams(settings: TextSettings) -> list[Iterator[Text]]:
    options = ReadOptions(settings.text_field, settings.encoding, settings.document_separator)
    sources = [parse_source(spec, hf_split=settings.hf_split, streaming=True) for spec in settings.sources]

    def documents(number: int) -> Iterator[Text]:
        spec, given = settings.sources[number], 0
        for found in once[number].documents(options):
            if isinstance(found, Document):
                for part in parts(found.name, [found.text]):
                    if isinstance(part, Document):
                        yield Text(spec, part.name, part.text)
                given += 1
                if given == settings.max_documents:
                    return
            elif not isinstance(found, Noticed):
                settings.skipped.add(found.name, found.reason, found.detail)

    once = each_file_once(sources)
    return [documents(number) for number in range(len(sources))]


def _read(settings: TextSettings) -> Iterator[Text]:
    for stream in _streams(settings):
        yield from stream


def _take_turns(settings: TextSettings) -> Iterator[Text]:
    streams, given = _streams(settings), [0] * len(settings.sources)
    while True:
        number = min(range(len(streams)), key=lambda n: given[n] / settings.weights[n])
        text = next(streams[number], None)
        if text is None:
            parts = zip(settings.sources, given, strict=True)
            read = ", ".join(f"{characters:,} characters of {printable(spec)}" for spec, characters in parts)
            settings.notes.append(f"{printable(settings.sources[number])} ended first, after {read}")
            return
        given[number] += len(text.text)
        yield text
