"""Types of numbers and paths with the range that each accepts, for recipes, studies and options.

An upper bound is past anything in use: it refuses a slip, such as a size of 10**12, before anything
of that size is made.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema

Count = Annotated[int, Field(ge=0, le=10**9)]
"""Steps, sequences, checkpoints; or none."""

PositiveCount = Annotated[int, Field(ge=1, le=10**9)]
"""Steps, sequences, checkpoints."""

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""Seeds every generator in use."""

Tokens = Annotated[int, Field(ge=1, le=10**15)]
"""Of a whole run."""

Rows = Annotated[int, Field(ge=1, le=2**20)]
"""Sequences of a batch, or entries of a table in memory."""

Length = Annotated[int, Field(ge=1, le=2**27)]
"""Tokens of a sequence."""

Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
"""Rows of an embedding."""

Width = Annotated[int, Field(ge=1, le=2**20)]
"""Of a matrix."""

Heads = Annotated[int, Field(ge=1, le=2**14)]
"""Of attention, in a layer."""

Layers = Annotated[int, Field(ge=1, le=2048)]
"""Of a model."""

Ranks = Annotated[int, Field(ge=1, le=2**20)]
"""Processes, or GPUs."""

Processes = Annotated[int, Field(ge=1, le=1024)]
"""On one machine."""

ImportPath = Annotated[
    str,
    Field(
        pattern=r"^[\w.]+:[\w.]+$", json_schema_extra={"accepted": "an import path such as my_package.attention:Mine"}
    ),
]
"""Of code of the user's own, as module:name."""


def is_import_path(text: str) -> bool:
    """Whether a text that names one of several things is an `ImportPath` instead."""
    return ":" in text


Fraction = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, which may be none or all."""

Probability = Annotated[float, Field(gt=0, le=1)]
"""As a `Fraction`, but above 0."""


def _temperature(value: float) -> float:
    if 0 < value < 1e-6:
        raise ValueError
    return value


Temperature = Annotated[
    float,
    Field(ge=0, le=1000, json_schema_extra={"accepted": "0, or a number from 1e-6 to 1,000"}),
    AfterValidator(_temperature),
]
"""Of sampling, 0 for the likeliest token; logits divided by less than 1e-6 may overflow."""

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a running mean: 0 forgets at once."""

Multiplier = Annotated[float, Field(ge=1e-9, le=10**6)]
"""A positive number by which others are multiplied, or with which they are compared."""

Weight = Annotated[float, Field(ge=0, le=10**6)]
"""As `Multiplier`, or 0 for no part at all."""

LearningRate = Annotated[float, Field(ge=0, le=10)]
"""Of updates whose size is about 1; 0 holds the weights still."""

NormEpsilon = Annotated[float, Field(ge=1e-12, le=1)]
"""Of a norm: below, the gradient of a row of zeros overflows in float32."""

Seconds = Annotated[float, Field(gt=0, le=10**7)]
"""A time to wait; the most is about four months."""


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    if max(map(len, os.fsencode(value).split(b"/"))) > 255 or len(value) > 4000:  # what file systems take
        raise ValueError
    return value


# Not pydantic's text, which refuses what Python makes of a name that is not UTF-8.
FilePath = Annotated[
    str, PlainValidator(_path), WithJsonSchema({"type": "string", "accepted": "a non-empty path"}, mode="validation")
]
"""A file's or a folder's path, as text."""

LossByLayer = Annotated[
    dict[Annotated[int, Field(ge=0, lt=2048)], Weight],
    WithJsonSchema({"type": "object", "accepted": "layers' indices with a weight each, such as {2: 2.4e-4}"}),
]
"""A loss's weights by the index of a layer."""

Matmul = Literal["compute", "fp8", "mxfp8"]
"""`compute`: the compute dtype; `fp8`: E4M3, a scale a row; `mxfp8`: E4M3, a scale for 32."""
