"""The options of data preparation."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motifarch.errors import UserError


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
    hf_split: str = "train"
    max_documents: int | None = None
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
            raise UserError("no --source: take stdlib, files:GLOB or hf:NAME[:CONFIG]")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"--validation-fraction {self.validation_fraction}: it must lie between 0 and 1")
        for name in ("seq_len", "num_proc", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")

    def deciding(self) -> dict[str, Any]:
        """The options that decide what the prepared data hold."""
        options = asdict(self)
        for name in ("output", "streaming", "num_proc", "strict", "overwrite"):
            del options[name]
        options["sources"] = list(self.sources)
        if self.tokenizer is not None:
            options["vocab_size"] = None
        return options
