"""What an entry says of what it was made from and with, by its kind.

A ledger comes from whoever made the run, so that each field is checked before it is used.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # typing's own serves pydantic from Python 3.12 on

FIRST_WEIGHTS, START, CHECKPOINT, AVERAGE = "first weights", "start", "checkpoint", "average"
"""Kinds of entries of runs, and of a mean; a start is from another run's checkpoint."""
KEPT = ("recipe", "model", "environment")
"""The fields that are hashes of files beside the ledger."""

_Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_STRICT = ConfigDict(strict=True)


class _Outside(TypedDict):
    outside: str


class _Inside(TypedDict):
    entry: _Hash


_Origin = _Outside | _Inside | None


class _Run(TypedDict):
    """What all entries of a run say."""

    parent: _Hash | None
    recipe: _Hash
    model: _Hash
    environment: _Hash
    data: list[str]
    rows: list[_Hash | None]
    tokenizer: str


@with_config(_STRICT)
class _FirstWeights(_Run):
    kind: Literal["first weights"]
    weights: _Hash
    seed: int
    origin: _Origin


@with_config(_STRICT)
class _Start(_Run):
    kind: Literal["start"]
    weights: _Hash | None
    origin: _Origin


_Rows = TypedDict("_Rows", {"from": int, "to": int, "sha256": _Hash})


@with_config(_STRICT)
class _Checkpoint(_Run):
    kind: Literal["checkpoint"]
    weights: _Hash
    state: _Hash
    metrics: _Rows


@with_config(_STRICT)
class _Derived(TypedDict):
    kind: Literal["export", "growth", "patch"]
    parent: _Hash | None
    weights: _Hash
    origin: _Origin
    environment: _Hash
    dtype: NotRequired[str]
    adapter: NotRequired[bool]


@with_config(_STRICT)
class _Average(TypedDict):
    kind: Literal["average"]
    parent: _Hash | None
    weights: _Hash
    state: _Hash
    origin: _Origin
    environment: _Hash
    of: list[_Hash | None]


_LINK: TypeAdapter[Any] = TypeAdapter(
    Annotated[_FirstWeights | _Start | _Checkpoint | _Derived | _Average, Field(discriminator="kind")]
)


def is_link(content: Any) -> bool:
    """Whether it has every field of its kind, each of its type."""
    try:
        _LINK.validate_python(content)
    except ValidationError:
        return False
    return True
