"""Wrong and right values for a type, and a limit on the time that one may take."""

import dataclasses
import math
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st

LIMIT_S = 120
"""Far above any command here. Some load all of lm-eval's tasks, for which a machine at work
elsewhere has taken 20 seconds."""

WRONG: dict[str, Any] = {
    "null": None,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "0": 0,
    "1e12": 10**12,
    "past int64": 10**30,
    "5000 digits": 1 << 16_600,
    "1e300": 1e300,
    "1.5": 1.5,
    "empty": "",
    "NUL": "a\0b",
    "word": "many",
    "true": True,
    "list": ["many"],
    "empty list": [],
    "map": {"many": 1},
    "empty map": {},
}
"""By name; a number of 5,000 digits has none that Python would print."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field's type says: its plain types, choices and bounds."""

    types: frozenset[Any]
    choices: tuple[Any, ...] = ()
    bounds: tuple[Any, ...] = ()

    @property
    def numeric(self) -> bool:
        return bool(self.types & {int, float})

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        return all(_within(value, bound) for bound in self.bounds)

    @property
    def truth(self) -> bool:
        return bool in self.types


def kind_of(hint: Any) -> Kind:
    """Reads a type hint, with the bounds that pydantic and annotated_types know."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = [kind_of(part) for part in get_args(hint)]
        return Kind(
            frozenset().union(*(p.types for p in parts)),
            tuple(c for p in parts for c in p.choices),
            tuple(b for p in parts for b in p.bounds),
        )
    if origin is Annotated:
        of = kind_of(get_args(hint)[0])
        found = [m for extra in hint.__metadata__ for m in getattr(extra, "metadata", [extra])]
        return dataclasses.replace(of, bounds=of.bounds + tuple(m for m in found if isinstance(m, Ge | Gt | Le | Lt)))
    if origin is Literal:
        return Kind(frozenset(), get_args(hint))
    return Kind(frozenset({origin or hint}))


def fields(section: type, prefix: str = "") -> Iterator[tuple[str, Kind, Any]]:
    """Dotted names of a schema's fields with their kinds and defaults; [0] for a list's entry."""
    hints = get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        default = field.default_factory() if callable(field.default_factory) else field.default
        (entry, *_) = get_args(hint) or (None,)
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{name}.")  # type: ignore[arg-type]
        else:
            yield name, kind_of(hint), default
            if get_origin(hint) is list and dataclasses.is_dataclass(entry):
                yield from fields(entry, f"{name}[0].")  # type: ignore[arg-type]


def right_values(kind: Kind, default: Any) -> list[Any]:
    """Values near the default that a type accepts: itself, choices, null, and within bounds."""
    found = [*kind.choices]
    if kind.truth:
        found += [True, False]
    if types.NoneType in kind.types:
        found.append(None)
    if default is not dataclasses.MISSING:
        found.append(list(default) if isinstance(default, tuple) else default)
    if isinstance(default, int | float) and not isinstance(default, bool):
        near = [default * 2, default // 2 if isinstance(default, int) else default / 2]
        found += [v for v in near if kind.holds(v)]
    return list({repr(v): v for v in found}.values())


def drawn_values(kind: Kind) -> st.SearchStrategy[Any]:
    """Numbers, and what the kind may choose from.

    Whole numbers are small, or larger than any that is right: a million columns are accepted, and
    take the machine's memory.
    """
    choices = [st.sampled_from(kind.choices)] if kind.choices else []
    whole = (st.integers(-3, 40), st.integers(min_value=10**12), st.integers(max_value=-4))
    return st.one_of(*choices, *whole, st.floats(), st.booleans(), st.none())


def _within(value: Any, bound: Any) -> bool:
    match bound:
        case Ge(ge):
            return bool(value >= ge)
        case Gt(gt):
            return bool(value > gt)
        case Le(le):
            return bool(value <= le)
        case Lt(lt):
            return bool(value < lt)
    return True


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises TimeoutError in the block once it has taken `LIMIT_S`."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
