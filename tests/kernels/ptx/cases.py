"""Small calls of every kernel family with their answers in float64.

A case runs the public functions, compiled for a GPU and emulated, and returns each result's largest
error relative to the largest number of the float64 answer. Memory that a launch should fill is NaN
before.

    python -m tests.kernels.ptx.cases attention --d 64 --dv 128 --group 4 --tokens 70
"""

import argparse
import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Errors = dict[str, float]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, new memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest number; NaN if any number is NaN."""
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention(
    d: int = 64,
    dv: int = 128,
    group: int = 1,
    noise: int = 1,
    tokens: int = 70,
    *,
    keys: int | None = None,
    key_heads: int | None = None,
    batch: int = 1,
    lengths: tuple[int, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    window: int = -1,
    causal: bool = True,
    softcap: float = 0.0,
    epilogue: str = "norm",
    lam: str = "head",
    softmax: bool = False,
    deterministic: bool = True,
    max_logits: bool = True,
    backward: bool = True,
    backend: str = "triton",
) -> Errors:
    """Attention forward and backward; ``lengths`` are those of packed documents."""
    from motif_kernels import diff_attn_func, diff_attn_varlen_func

    keys, key_heads = keys or tokens, key_heads or noise
    if lengths:
        tokens = keys = sum(lengths)
    rows, columns = ((tokens,), (keys,)) if lengths else ((batch, tokens), (batch, keys))
    heads = group * noise
    lam_shape = {"head": (heads,), "token": (*rows, heads), "one": ()}[lam]
    shapes = {
        "q1": (*rows, heads, d),
        "k1": (*columns, key_heads, d),
        "q2": (*rows, noise, d),
        "k2": (*columns, key_heads, d),
        "v": (*columns, key_heads, dv),
        "lam": lam_shape,
        "norm_weight": (dv,) if epilogue == "norm" else None,
        "gate": (*rows, heads, dv) if epilogue == "gate" else None,
    }
    if softmax:
        shapes |= dict.fromkeys(("q2", "k2", "lam"))
    leaves: dict[str, Tensor] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if shape is not None:
            kind = torch.float32 if name in ("lam", "norm_weight") else dtype
            leaves[name] = numbers(*shape, dtype=kind, seed=i).requires_grad_(backward)
    grad = numbers(*rows, heads, dv, dtype=dtype, seed=99)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    options: dict[str, Any] = {"causal": causal, "window_size": (window, 0 if causal else -1), "softcap": softcap}
    options |= {"out_scale": 0.8, "return_max_logits": max_logits, "deterministic": deterministic}

    def call(tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        given = [tensors.get(name) for name in ("q1", "k1", "q2", "k2", "v", "lam")]
        extra = {name: tensors[name] for name in ("norm_weight", "gate") if name in tensors}
        if lengths:
            packed = (bounds, bounds, max(lengths), max(lengths))
            out = diff_attn_varlen_func(*given, *packed, **options, **extra, backend=backend)
        else:
            out = diff_attn_func(*given, **options, **extra, backend=backend)
        results = out if isinstance(out, tuple) else (out,)
        if backward:
            results += torch.autograd.grad(results[0], list(tensors.values()), grad.to(results[0].dtype))
        return results

    with poisoned():
        actual = call(leaves, backend)
    expected = call({n: t.detach().double().requires_grad_(backward) for n, t in leaves.items()}, "reference")
    names = [
        "out",
        *(["max_signal", "max_noise"][: 1 if softmax else 2] if max_logits else []),
        *(f"d{n}" for n in leaves if backward),
    ]
    pairs = zip(names, actual, expected, strict=True)
    return {name: relative_error(a, e) for name, a, e in pairs if e.numel()}


def decoding(
    d: int = 64,
    dv: int = 128,
    group: int = 4,
    noise: int = 1,
    cached: tuple[int, ...] = (60, 23),
    *,
    queries: int = 1,
    paged: bool = False,
    softmax: bool = False,
    splits: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    epilogue: str = "norm",
) -> Errors:
    """New tokens appended to a cache, and attention to it."""
    from motif_kernels import diff_attn_with_kvcache

    rows, capacity = len(cached), 64
    heads = group * noise
    table = torch.arange(rows * 4).flip(0).view(rows, 4).int() if paged else None
    place = (rows * 4, 16) if paged else (rows, capacity)
    widths = {"k1": d, "k2": d, "v": dv}
    caches = {n: numbers(*place, noise, w, dtype=dtype, seed=i) for i, (n, w) in enumerate(widths.items())}
    new = {n: numbers(rows, queries, noise, w, dtype=dtype, seed=10 + i) for i, (n, w) in enumerate(widths.items())}
    q1, q2 = (numbers(rows, queries, h, d, dtype=dtype, seed=20 + h) for h in (heads, noise))
    lam, weight = numbers(heads, dtype=torch.float32, seed=31), numbers(dv, dtype=torch.float32, seed=32)
    if softmax:
        q2 = lam = caches["k2"] = new["k2"] = None  # type: ignore[assignment]
    cast = lambda t, kind: None if t is None else t.to(kind).clone()  # noqa: E731

    def call(kind: torch.dtype, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
        own = {n: cast(c, kind) for n, c in caches.items()}
        out = diff_attn_with_kvcache(
            cast(q1, kind),
            own["k1"],
            cast(q2, kind),
            own["k2"],
            own["v"],
            lam,
            torch.tensor(cached, dtype=torch.int32),
            **{n: cast(t, kind) for n, t in new.items()},
            block_table=table,
            num_splits=splits,
            causal=True,
            norm_weight=cast(weight, kind if kind == torch.float64 else torch.float32) if epilogue == "norm" else None,
            out_scale=0.8,
            backend=backend,
        )
        return out, own

    with poisoned():
        actual, appended = call(dtype, "triton")
    expected, rest = call(torch.float64, "reference")
    errors = {"out": relative_error(actual, expected)}
    return errors | {n: relative_error(c, rest[n]) for n, c in appended.items() if c is not None}


def poly_norm(
    columns: int = 1000,
    rows: int = 5,
    *,
    up: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    clamp: float = 0.0,
) -> Errors:
    """PolyNorm forward and backward; ``clamp``: of the squashed hidden values, if positive."""
    import motif_kernels
    from motif_kernels import reference

    x, other, grad = (numbers(rows, columns, dtype=dtype, seed=i) for i in range(3))
    weight, bias = numbers(3, dtype=torch.float32, seed=3), numbers(1, dtype=torch.float32, seed=4)
    names = ["x", *(["up"] if up else []), "weight", "bias"]
    leaves = [t.requires_grad_() for t in (x, *([other] if up else []), weight, bias)]
    with poisoned():
        function = motif_kernels.mul_poly_norm if up else motif_kernels.poly_norm
        out = function(*leaves, **({"hidden_clamp": clamp} if clamp else {}))
        actual = (out, *torch.autograd.grad(out, leaves, grad))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    squashed = doubles[0].clamp(-clamp, clamp) if clamp else doubles[0]
    plain = reference.mul_poly_norm if up else reference.poly_norm
    expected = plain(squashed, *doubles[1:])
    wanted = (expected, *torch.autograd.grad(expected, doubles, grad.double()))
    pairs = zip(["out", *(f"d{n}" for n in names)], actual, wanted, strict=True)
    return {name: relative_error(a, e) for name, a, e in pairs}


def combine(
    width: int = 128,
    group: int = 4,
    noise: int = 2,
    tokens: int = 37,
    *,
    epilogue: str = "norm",
    dtype: torch.dtype = torch.bfloat16,
) -> Errors:
    """The difference of two maps' outputs and its epilogue, forward and backward."""
    from motif_kernels import diff_combine, reference

    heads = group * noise
    grad = numbers(1, tokens, heads, width, dtype=dtype, seed=0)
    given = {
        "signal": numbers(1, tokens, heads, width, dtype=dtype, seed=1),
        "noise": numbers(1, tokens, noise, width, dtype=dtype, seed=2),
        "lam": numbers(heads, dtype=torch.float32, seed=3),
    }
    if epilogue == "norm":
        given["norm_weight"] = numbers(width, dtype=torch.float32, seed=4)
    if epilogue == "gate":
        given["gate"] = numbers(1, tokens, heads, width, dtype=dtype, seed=5)

    def call(function: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {n: t.requires_grad_() for n, t in tensors.items()}
        first = [leaves[n] for n in ("signal", "noise", "lam")]
        extra: dict[str, Any] = {n: leaves[n] for n in ("norm_weight", "gate") if n in leaves}
        out = function(*first, norm_eps=1e-5, out_scale=0.8, **({"norm_weight": None, "gate": None} | extra))
        return (out, *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)))

    with poisoned():
        actual = call(diff_combine, given)
    expected = call(reference.diff_combine, {n: t.detach().double() for n, t in given.items()})
    pairs = zip(["out", *(f"d{n}" for n in given)], actual, expected, strict=True)
    return {name: relative_error(a, e) for name, a, e in pairs}


CASES = {"attention": attention, "decoding": decoding, "poly_norm": poly_norm, "combine": combine}


def _arguments(case: Any) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"tests.kernels.ptx.cases {case.__name__}")
    for name, parameter in inspect.signature(case).parameters.items():
        default, flag = parameter.default, f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            made.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        elif isinstance(default, tuple):
            made.add_argument(flag, nargs="+", type=int, default=default)
        elif isinstance(default, torch.dtype):
            made.add_argument(flag, type=lambda n: getattr(torch, n), default=default)
        else:
            made.add_argument(flag, type=type(default) if default is not None else int, default=default)
    return made


def main(argv: list[str]) -> None:
    from tests.kernels.ptx.launching import emulated

    case = CASES[argv[0]]
    options = vars(_arguments(case).parse_args(argv[1:]))
    with emulated(verbose=True):
        errors = case(**options)
    print({name: f"{error:.1e}" for name, error in errors.items()})


if __name__ == "__main__":
    import os
    import sys

    os.environ["TRITON_INTERPRET"] = "0"
    main(sys.argv[1:])
