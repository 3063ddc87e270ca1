"""The options of data preparation."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from motifarch.data.documents import printable
from motifarch.errors import UserError


def check_reading(encoding: str, document_separator: str | None) -> None:
    """Raise UserError for what no text can be read with."""
    if document_separator == "":
        raise UserError("--document-separator '': it must hold a character at least, such as \\n")
    try:
        "a".encode(encoding)
    except (LookupError, ValueError):
        raise UserError(f"--encoding {encoding!r}: no encoding of text; take utf-8, cp949, latin-1, ...") from None


@dataclass(frozen=True)
class PrepareSettings:
    """The options of ``motifarch data prepare``; its help explains them."""

    sources: tuple[str, ...]
    output: Path
    tokenizer: str | None = None
    vocab_size: int = 4096
    seq_len: int = 512
    validation_fraction: float = 0.05
    seed: int = 0
    text_field: str = "text"
    encoding: str = "utf-8"
    document_separator: str | None = None
    special_tokens: Literal["text", "tokens"] = "text"
    messages: bool = False
    chat_template: str | None = None
    hf_split: str = "train"
    max_documents: int | None = None
    languages: tuple[str, ...] = ()
    deduplicate: Literal["no", "exact", "minhash"] = "no"
    duplicate_threshold: float = 0.8
    shard: str | None = None
    """``K/N``: of N parts of the documents the one numbered K, from 1."""
    streaming: bool = False
    num_proc: int = 1
    strict: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the option.
        """
        if not self.sources:
            raise UserError("no --source: take stdlib, files:GLOB, a URL or hf:NAME[:CONFIG]")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"--validation-fraction {self.validation_fraction}: it must lie between 0 and 1")
        check_reading(self.encoding, self.document_separator)
        number, of = self.shard_of
        if not 1 <= number <= of:
            raise UserError(f"--shard {self.shard!r}: it must be K/N, with K from 1 to N, such as 2/8")
        if self.shard is not None and self.tokenizer is None:
            raise UserError("--shard without --tokenizer: all shards need the same; train one, and give it to each")
        for option in ("messages", "chat_template"):
            if getattr(self, option) and self.tokenizer is None:
                raise UserError(
                    f"--{option.replace('_', '-')} without --tokenizer: conversations are for a model that is there; "
                    "give its tokenizer, such as --tokenizer runs/tiny_cpu/export"
                )
        if self.special_tokens not in ("text", "tokens"):
            raise UserError(f"--special-tokens {self.special_tokens}: it must be text or tokens")
        if printable(self.output) != str(self.output):
            raise UserError(
                f"--output {printable(self.output)}: its name is not UTF-8, and Arrow opens no such file: give another"
            )
        if self.deduplicate not in ("no", "exact", "minhash"):
            raise UserError(f"--deduplicate {self.deduplicate}: it must be no, exact or minhash")
        if not 0 < self.duplicate_threshold <= 1:
            raise UserError(f"--duplicate-threshold {self.duplicate_threshold}: it must be above 0 and at most 1")
        if self.deduplicate != "minhash" and self.duplicate_threshold != PrepareSettings.duplicate_threshold:
            raise UserError(
                f"--duplicate-threshold {self.duplicate_threshold} is of --deduplicate minhash: leave it out, or "
                "take that"
            )
        for name in ("seq_len", "num_proc", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")

    @property
    def shard_of(self) -> tuple[int, int]:
        """Number and count of ``shard``; 1 of 1 without one, 0 of 0 if it is not of the form."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", "1/1" if self.shard is None else self.shard)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def field(self) -> str:
        """The field of a record that holds its text or conversation."""
        return "messages" if self.messages and self.text_field == "text" else self.text_field

    def deciding(self) -> dict[str, Any]:
        """The options that decide what the prepared data hold."""
        options = asdict(self)
        for name in ("output", "streaming", "num_proc", "strict", "overwrite"):
            del options[name]
        options["sources"] = [printable(source) for source in self.sources]
        options["languages"] = sorted(set(self.languages))
        if self.tokenizer is not None:
            options["vocab_size"] = None
        return options

    def changes(self, before: dict[str, Any]) -> list[str]:
        """What these options change of what ``deciding`` gave before."""
        defaults = {f.name: f.default for f in fields(self)} | {"languages": []}
        return [
            f"{name} was {was!r}, now {value!r}"
            for name, value in self.deciding().items()
            if (was := before.get(name, defaults[name])) != value
        ]
