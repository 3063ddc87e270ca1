"""How much is measured of a finished run."""

from dataclasses import dataclass

from motifarch.errors import UserError

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class MeasureOptions:
    """How much is measured: more takes longer and errs less."""

    lengths: tuple[int, ...] = ()
    """Tokens of the probe's contexts; empty for parts of the training length."""

    depths: tuple[float, ...] = DEPTHS
    """Where in them the lines lie, from 0 to 1, ascending."""

    samples: int = 64
    """Contexts of each length, an even number."""

    probe_rows: int = 8
    """Contexts that go through the model at once."""

    attention_rows: int = 8
    """Validation rows for the attention statistics, evenly spread."""

    prefill_tokens: int | None = None
    """Prompt in the cache when decoding is timed; null for the training sequences' length."""

    new_tokens: int = 64
    """Tokens decoded after it."""

    repeats: int = 5
    """Timed repeats of that, after one that is not counted."""

    def __post_init__(self) -> None:
        for name in ("probe_rows", "attention_rows", "prefill_tokens", "new_tokens", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
