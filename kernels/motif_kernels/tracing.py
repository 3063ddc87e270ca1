"""Telling torch.compile about functions, without importing its tracer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant(function: _Function) -> _Function:
    """A decorator: a tracer takes the result, which depends on the machine and on constants only,
    as a constant.

    ``torch.compiler.assume_constant_result`` sets this attribute too, but it imports torch._dynamo,
    and that triton: a second, for everyone who only imports a layer.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
