"""Small calls of every kernel family, held to the error rule against float64.

A case runs the public functions as compiled for a GPU and emulated. Memory that a launch should
fill is NaN before.

    TRITON_INTERPRET=0 python -m tests.kernels.ptx.cases attention --d 64 --dv 128 --group 4
"""

import argparse
import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers.numerics import assert_error_rule


class Result(NamedTuple):
    """What a case gives, what plain PyTorch gives at its precision, and in float64.

    ``rows`` have been added up, each rounded: a random walk.
    """

    actual: Tensor
    plain: Tensor
    exact: Tensor
    rows: int = 1

    def error(self) -> float:
        """The largest error, as a share of the largest number; NaN if any number is NaN."""
        largest = self.exact.abs().max().clamp(min=1e-30)
        return ((self.actual.double() - self.exact).abs().max() / largest).item()

    def check(self, dtype: torch.dtype) -> None:
        """Raises AssertionError if it breaks the error rule."""
        floor = torch.finfo(dtype).eps * self.exact.abs().max().clamp(min=1).item() * self.rows**0.5
        assert_error_rule(self.actual, self.plain, self.exact, precision=dtype, floor=floor if self.rows > 1 else None)


Results = dict[str, Result]


def results(names: list[str], *values: Any, rows: dict[str, int] | None = None) -> Results:
    """By name from what actual, plain and exact give; those that are empty are left out."""
    of_name = zip(names, *values, strict=True)
    made = {n: Result(*(t.detach() for t in ts), (rows or {}).get(n, 1)) for n, *ts in of_name}
    return {n: r._replace(exact=r.exact.double()) for n, r in made.items() if r.exact.numel()}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, new memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_attention(tensors: dict[str, Tensor], visible: Tensor, softcap: float = 0.0) -> tuple[Tensor, ...]:
    """Attention (B, S, H, D) as one writes it down, and the largest logits of its maps."""
    blind = ~visible.any(-1, keepdim=True)

    def attend(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        heads = q.shape[2]
        q, k, v = (t.repeat_interleave(heads // t.shape[2], 2).transpose(1, 2) for t in (q, k, tensors["v"]))
        logits = q * q.shape[-1] ** -0.5 @ k.mT
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~(visible | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0)
        return (weights @ v).transpose(1, 2), logits.masked_fill(~visible, -torch.inf).amax((0, 2, 3))

    out, *largest = attend(tensors["q1"], tensors["k1"])
    if "lam" in tensors:
        noise, logits = attend(tensors["q2"], tensors["k2"])
        lam = tensors["lam"].to(out.dtype)
        out = out - (lam[..., None] if lam.ndim else lam) * noise.repeat_interleave(out.shape[2] // noise.shape[2], 2)
        largest.append(logits)
    if "norm_weight" in tensors:
        mean = (out * out).mean(-1, keepdim=True)
        out = out / torch.sqrt(mean + 1e-5) * tensors["norm_weight"].to(out.dtype)
    if "gate" in tensors:
        out = out * torch.sigmoid(tensors["gate"])
    return (out * 0.8, *largest)


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {n: t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for n, t in tensors.items()}


def attention(
    d: int = 64,
    dv: int = 128,
    group: int = 1,
    noise: int = 1,
    tokens: int = 70,
    *,
    keys: int = 0,
    key_heads: int = 0,
    batch: int = 1,
    lengths: tuple[int, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    window: int = -1,
    causal: bool = True,
    softcap: float = 0.0,
    epilogue: str = "norm",
    lam: str = "head",
    softmax: bool = False,
    shared_keys: bool = False,
    deterministic: bool = True,
    backward: bool = True,
    backend: str = "triton",
) -> Results:
    """Attention forward and backward; ``lengths`` are those of packed documents."""
    from motif_kernels import diff_attn_func, diff_attn_varlen_func, reference

    keys, key_heads = keys or tokens, key_heads or noise
    if lengths:
        tokens = keys = sum(lengths)
    heads = group * noise
    shapes: dict[str, Any] = {
        "q1": (batch, tokens, heads, d),
        "k1": (batch, keys, key_heads, d),
        "q2": (batch, tokens, noise, d),
        "k2": (batch, keys, key_heads, d),
        "v": (batch, keys, key_heads, dv),
        "lam": {"head": (heads,), "token": (batch, tokens, heads), "one": ()}[lam],
    }
    if softmax:
        del shapes["q2"], shapes["k2"], shapes["lam"]
    if epilogue == "norm":
        shapes["norm_weight"] = (dv,)
    if epilogue == "gate":
        shapes["gate"] = (batch, tokens, heads, dv)
    narrow = {n: torch.float32 if n in ("lam", "norm_weight") else dtype for n in shapes}
    given = {n: numbers(*shape, dtype=narrow[n], seed=i) for i, (n, shape) in enumerate(shapes.items())}
    if shared_keys:
        del given["k2"]
    grad = numbers(batch, tokens, heads, dv, dtype=dtype, seed=99)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mask: dict[str, Any] = {"causal": causal, "window_size": (window, 0 if causal else -1)}
    packed = (bounds, bounds, tokens, keys)
    visible = (
        reference.packed_attention_mask(*packed, **mask) if lengths else reference.attention_mask(tokens, keys, **mask)
    )

    def public(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"softcap": softcap, "out_scale": 0.8, "return_max_logits": True, **mask}
        options |= {"deterministic": deterministic, "backend": backend}
        if lengths:
            tensors = {n: t[0] if t.ndim > 2 else t for n, t in tensors.items()}
        first = [tensors.get(name) for name in ("q1", "k1", "q2", "k2", "v", "lam")]
        options |= {name: tensors[name] for name in ("norm_weight", "gate") if name in tensors}
        if lengths:
            longest = max(lengths)
            out, *largest = diff_attn_varlen_func(*first, bounds, bounds, longest, longest, **options)
            return (out[None], *largest)
        return tuple(diff_attn_func(*first, **options))

    def run(
        function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        own = leaves(given, dtype)
        outs = function(own | ({"k2": own["k1"]} if shared_keys else {}))
        return outs + (torch.autograd.grad(outs[0], list(own.values()), grad.to(outs[0].dtype)) if backward else ())

    with poisoned():
        actual = run(public, None)
    others = (run(lambda t: plain_attention(t, visible, softcap), kind) for kind in (dtype, torch.float64))
    names = ["out", *["max_signal", "max_noise"][: 1 if softmax else 2], *(f"d{n}" for n in given if backward)]
    rows = batch * tokens * heads
    return results(names, actual, *others, rows={"dlam": rows if lam != "token" else dv, "dnorm_weight": rows})


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
    backend: str = "triton",
) -> Results:
    """New tokens appended to a cache, and attention to it."""
    from motif_kernels import diff_attn_with_kvcache, reference

    rows, heads = len(cached), group * noise
    table = torch.arange(rows * 4).flip(0).view(rows, 4).int() if paged else None
    widths = {"k1": d, "v": dv} if softmax else {"k1": d, "k2": d, "v": dv}
    place = (rows * 4, 16) if paged else (rows, 64)
    caches = {n: numbers(*place, noise, w, dtype=dtype, seed=i) for i, (n, w) in enumerate(widths.items())}
    new = {n: numbers(rows, queries, noise, w, dtype=dtype, seed=10 + i) for i, (n, w) in enumerate(widths.items())}
    fixed = {"q1": numbers(rows, queries, heads, d, dtype=dtype, seed=20)}
    if not softmax:
        fixed["q2"] = numbers(rows, queries, noise, d, dtype=dtype, seed=21)
        fixed["lam"] = numbers(heads, dtype=torch.float32, seed=22)
    fixed["norm_weight"] = numbers(dv, dtype=torch.float32, seed=23)
    whole = {n: c[table].flatten(1, 2).clone() if table is not None else c.clone() for n, c in caches.items()}
    for n, cache in whole.items():
        for row, length in enumerate(cached):
            cache[row, length : length + queries] = new[n][row]

    def plain(kind: torch.dtype) -> tuple[Tensor, ...]:
        outs = []
        for row, length in enumerate(cached):
            tensors = {n: t[row : row + 1] if t.ndim > 2 else t for n, t in fixed.items()}
            tensors |= {n: c[row : row + 1, : length + queries] for n, c in whole.items()}
            visible = reference.attention_mask(queries, length + queries, causal=True)
            outs.append(plain_attention({n: t.to(kind) for n, t in tensors.items()}, visible)[0])
        return (torch.cat(outs), *(c.to(kind) for c in whole.values()))

    with poisoned():
        out = diff_attn_with_kvcache(
            fixed["q1"],
            caches["k1"],
            fixed.get("q2"),
            caches.get("k2"),
            caches["v"],
            fixed.get("lam"),
            torch.tensor(cached, dtype=torch.int32),
            **new,
            block_table=table,
            num_splits=splits,
            causal=True,
            norm_weight=fixed["norm_weight"],
            out_scale=0.8,
            backend=backend,
        )
    after = (c[table].flatten(1, 2) if table is not None else c for c in caches.values())
    return results(["out", *whole], (out, *after), plain(dtype), plain(torch.float64))


def latent_decoding(
    latent: int = 512,
    rotated: int = 64,
    signals: int = 64,
    noises: int = 16,
    cached: tuple[int, ...] = (150, 23),
    *,
    queries: int = 1,
    paged: bool = False,
    splits: int = 2,
    dtype: torch.dtype = torch.bfloat16,
) -> Results:
    """Attention to a cache of latents, which are keys and values; it is NaN past each row's."""
    from motif_kernels import diff_attn_with_kvcache, reference

    rows, width = len(cached), latent + rotated
    held = torch.full((rows, 192, 1, width), torch.nan, dtype=dtype)
    for row, length in enumerate(cached):
        held[row, :length] = numbers(length, 1, width, dtype=dtype, seed=row)
    table = torch.arange(rows * 12).flip(0).view(rows, 12).int() if paged else None
    cache = held if table is None else held.unflatten(1, (12, 16)).flatten(0, 1).flip(0).contiguous()
    given = {"q1": numbers(rows, queries, signals, width, dtype=dtype, seed=20)}
    if noises:
        given["q2"] = numbers(rows, queries, noises, width, dtype=dtype, seed=21)
        given["lam"] = numbers(rows, queries, signals, dtype=torch.float32, seed=22)

    def plain(kind: torch.dtype) -> tuple[Tensor, ...]:
        outs = []
        for row, length in enumerate(cached):
            tensors = {n: t[row : row + 1].to(kind) for n, t in given.items()}
            keys = held[row : row + 1, :length].to(kind)
            tensors |= {"k1": keys, "k2": keys, "v": keys[..., :latent]}
            visible = reference.attention_mask(queries, length, causal=True)
            outs.append(plain_attention(tensors, visible)[0])
        return (torch.cat(outs),)

    with poisoned():
        out = diff_attn_with_kvcache(
            given["q1"],
            cache,
            given.get("q2"),
            cache if noises else None,
            cache[..., :latent],
            given.get("lam"),
            torch.tensor(cached, dtype=torch.int32),
            block_table=table,
            num_splits=splits,
            causal=True,
            out_scale=0.8,
            backend="triton",
        )
    return results(["out"], (out,), plain(dtype), plain(torch.float64))


def poly_norm(
    columns: int = 1000,
    rows: int = 5,
    *,
    up: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    clamp: float = 0.0,
) -> Results:
    """PolyNorm forward and backward; ``clamp``: of the squashed hidden values, if positive."""
    import motif_kernels
    from motif_kernels import reference

    given = {"x": numbers(rows, columns, dtype=dtype, seed=0), "up": numbers(rows, columns, dtype=dtype, seed=1)}
    given |= {"weight": numbers(3, dtype=torch.float32, seed=2), "bias": numbers(1, dtype=torch.float32, seed=3)}
    grad = numbers(rows, columns, dtype=dtype, seed=4)
    if not up:
        del given["up"]

    def run(function: Callable[..., Tensor], kind: torch.dtype | None) -> tuple[Tensor, ...]:
        own = leaves(given, kind)
        out = function(*own.values())
        return (out, *torch.autograd.grad(out, list(own.values()), grad.to(out.dtype)))

    def plain(x: Tensor, *rest: Tensor) -> Tensor:
        function = reference.mul_poly_norm if up else reference.poly_norm
        if clamp:
            x, rest = x.clamp(-clamp, clamp), (rest[0].clamp(-clamp, clamp), *rest[1:]) if up else rest
        return function(x, *rest).to(x.dtype)

    ours = motif_kernels.mul_poly_norm if up else motif_kernels.poly_norm
    with poisoned():
        actual = run(lambda *own: ours(*own, hidden_clamp=clamp or None), None)
    names = ["out", *(f"d{n}" for n in given)]
    return results(names, actual, run(plain, None), run(plain, torch.float64), rows={"dweight": rows, "dbias": rows})


def grouped_poly_norm(
    columns: int = 1024, *, clamp: float = 1.0, one_tensor: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Results:
    """PolyNorm of three experts, one of them without rows; NaN in the row of none. In MXFP8 too,
    which must be that of the result.
    """
    import motif_kernels
    from motif_kernels import grouped_poly_norm, reference

    rows, offsets = 6, torch.tensor([2, 2, 5], dtype=torch.int32)
    given = {"gate_up": numbers(rows, 2 * columns, dtype=dtype, seed=0)}
    given |= {"weight": numbers(3, 3, dtype=torch.float32, seed=2), "bias": numbers(3, 1, dtype=torch.float32, seed=3)}
    grad = numbers(rows, columns, dtype=dtype, seed=4)
    given["gate_up"][5:] = grad[5:] = torch.nan

    def run(function: Callable[..., Tensor], kind: torch.dtype | None) -> tuple[Tensor, ...]:
        own = leaves(given, kind)
        out = function(*own.values())
        return (out, *torch.autograd.grad(out, list(own.values()), grad.to(out.dtype)))

    def plain(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gate, up = gate_up.clamp(-clamp, clamp).chunk(2, dim=-1)
        out = reference.grouped_mul_poly_norm(gate, up, weight, bias, offsets)
        return out.clamp(-clamp, clamp).to(gate_up.dtype)

    def ours(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gate, up = (gate_up, None) if one_tensor else gate_up.chunk(2, dim=-1)
        return motif_kernels.grouped_mul_poly_norm(gate, up, weight, bias, offsets, hidden_clamp=clamp)

    with poisoned():
        actual = run(ours, None)
        quantised = grouped_poly_norm.grouped_mul_poly_norm_mxfp8(
            given["gate_up"], None, given["weight"], given["bias"], offsets, hidden_clamp=clamp
        )
    for found, expected in zip(quantised, reference.to_mxfp8(actual[0]), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    names = ["out", *(f"d{n}" for n in given)]
    return results(names, actual, run(plain, None), run(plain, torch.float64), rows={"dweight": rows, "dbias": rows})


def combine(
    width: int = 128,
    group: int = 4,
    noise: int = 2,
    tokens: int = 37,
    *,
    epilogue: str = "norm",
    dtype: torch.dtype = torch.bfloat16,
) -> Results:
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

    def run(function: Callable[..., Tensor], kind: torch.dtype | None) -> tuple[Tensor, ...]:
        own = leaves(given, kind)
        extra: dict[str, Any] = {n: own.get(n) for n in ("norm_weight", "gate")}
        out = function(own["signal"], own["noise"], own["lam"], norm_eps=1e-5, out_scale=0.8, **extra)
        return (out, *torch.autograd.grad(out, list(own.values()), grad.to(out.dtype)))

    with poisoned():
        actual = run(diff_combine, None)
    plain = run(lambda *own, **extra: reference.diff_combine(*own, **extra).to(dtype), None)
    rows = {"dlam": tokens, "dnorm_weight": tokens * heads}
    names = ["out", *(f"d{n}" for n in given)]
    return results(names, actual, plain, run(reference.diff_combine, torch.float64), rows=rows)


def hyper_connections(
    width: int = 64, streams: int = 4, tokens: int = 5, *, dtype: torch.dtype = torch.bfloat16
) -> Results:
    """Reading, maps and update of residual streams around a sublayer that multiplies."""
    import motif_kernels
    from motif_kernels import reference

    n, count = streams, streams * (streams + 2)
    given = {
        "streams": numbers(tokens, n, width, dtype=dtype, seed=0),
        "weight": numbers(count, n * width, dtype=torch.float32, seed=1) * (n * width) ** -0.5,
        "bias": numbers(count, dtype=torch.float32, seed=2),
        "factor": numbers(width, dtype=dtype, seed=3),
    }
    grad = numbers(tokens, n, width, dtype=dtype, seed=4)

    def run(functions: Any, kind: torch.dtype | None) -> tuple[Tensor, ...]:
        own = leaves(given, kind)
        read, products = functions.read_streams(own["streams"], own["weight"], own["bias"][:n])
        post, mix = functions.stream_maps(products, own["bias"][n:], iterations=20)
        out = functions.update_streams(own["streams"], read * own["factor"], post, mix)
        return (read, products, post, mix, out, *torch.autograd.grad(out, list(own.values()), grad.to(out.dtype)))

    with poisoned():
        actual = run(motif_kernels, None)
    names = ["read", "products", "post", "mix", "out", *(f"d{n}" for n in given)]
    rows = dict.fromkeys(("products", "dweight", "dbias", "dfactor"), tokens * n * width)
    return results(names, actual, run(reference, None), run(reference, torch.float64), rows=rows)


def expert_rows(width: int = 1000, tokens: int = 9, slots: int = 3, *, dtype: torch.dtype = torch.bfloat16) -> Results:
    """Tokens to their experts' rows and back, forward and backward; some slots are of no expert."""
    from motif_kernels import combine_rows, dispatch_rows, reference_routing

    selected = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(0)).topk(slots).indices
    places, offsets = reference_routing.sort_by_expert(selected, 4)
    given = {
        "x": numbers(tokens, width, dtype=dtype, seed=1),
        "weights": numbers(tokens, slots, dtype=torch.float32, seed=2),
    }
    grad = numbers(tokens, width, dtype=torch.float32, seed=3)

    def run(
        dispatch: Callable[..., Tensor], combine: Callable[..., Tensor], kind: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        own = leaves(given, kind)
        out = combine(dispatch(own["x"], places, offsets), own["weights"], places, offsets)
        return (out, *torch.autograd.grad(out, list(own.values()), grad.to(out.dtype)))

    def plain(x: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
        return reference_routing.dispatch(x, places, offsets, places.numel())

    with poisoned():
        actual = run(dispatch_rows, combine_rows, None)
    others = (run(plain, reference_routing.combine, kind) for kind in (None, torch.float64))
    return results(["out", "dx", "dweights"], actual, *others)


CASES = {
    "attention": attention,
    "decoding": decoding,
    "latent_decoding": latent_decoding,
    "poly_norm": poly_norm,
    "grouped_poly_norm": grouped_poly_norm,
    "combine": combine,
    "hyper_connections": hyper_connections,
    "expert_rows": expert_rows,
}


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
        found = case(**options)
    print({name: f"{result.error():.1e}" for name, result in found.items()})
    for name, result in found.items():
        try:
            result.check(options["dtype"])
        except AssertionError as error:
            print(f"{name}: {error}")


if __name__ == "__main__":
    import os
    import sys

    os.environ["TRITON_INTERPRET"] = "0"
    main(sys.argv[1:])
