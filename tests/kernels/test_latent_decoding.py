"""Decoding against a cache of latents, which are keys and values in one."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.interpreter import require_interpreter
from helpers.numerics import assert_error_rule
from motif_kernels import diff_attn_func, diff_attn_with_kvcache, latent, packed_cache, tuning
from motif_kernels.ops import decoding as operator
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache

PAGE = 8
PLACES = 48
TILES = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1, "programs": 1}


class Case(NamedTuple):
    """Heads of a query, width of the latent and of the rotated columns."""

    signals: int
    noises: int
    latent: int
    rotated: int


MOTIF, ODD, DEEPSEEK, UNROTATED = Case(8, 2, 32, 16), Case(7, 7, 24, 4), Case(6, 0, 32, 8), Case(12, 3, 16, 0)


@pytest.fixture(params=["triton", "sdpa"])
def backend(request):
    """What reads latents where they lie; the kernel interpreted, in tiles smaller than its rows."""
    if request.param == "triton":
        require_interpreter()
    with tuning.overriding(decoding_latent=TILES, decoding_latent_float32=TILES):
        yield request.param


@pytest.fixture
def in_place(monkeypatch):
    """Packing is an error."""

    def packed(*_):
        raise AssertionError("the cache was packed")

    monkeypatch.setattr(packed_cache, "attend", packed)


def call_of(case: Case, dtype: torch.dtype, *, lengths: list[int], queries: int, paged: bool = False) -> dict[str, Any]:
    """Queries, and a cache that is NaN or infinite where no row has a token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, width = len(lengths), case.latent + case.rotated
    cache = torch.full((batch, PLACES, 1, width), torch.nan, dtype=dtype)
    cache[:, ::2] = torch.inf
    for row, length in enumerate(lengths):
        cache[row, :length] = normal(length, 1, width)
    call: dict[str, Any] = {"q1": normal(batch, queries, case.signals, width), "q2": None, "lam": None}
    if case.noises:
        call |= {"q2": normal(batch, queries, case.noises, width)}
        call |= {"lam": torch.rand(batch, queries, case.signals, generator=generator)}
    call |= {"cache": cache, "cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    if paged:
        table = torch.randperm(24, generator=generator)[: batch * PLACES // PAGE].view(batch, -1)
        pool = torch.full((24, PAGE, 1, width), torch.nan, dtype=dtype)
        pool[table] = cache.unflatten(1, (-1, PAGE))
        call |= {"cache": pool, "block_table": table.int()}
    return call | {"width": case.latent}


def decode(q1, q2, lam, cache, cache_seqlens, width, **options):
    k2 = None if q2 is None else cache
    return diff_attn_with_kvcache(q1, cache, q2, k2, cache[..., :width], lam, cache_seqlens, causal=True, **options)


def plain(call: dict[str, Any], dtype: torch.dtype, *, leftpad: tuple[int, ...] = (), window: int = -1) -> Tensor:
    """Each row by itself as one writes it down."""
    cache, outs = call["cache"].to(dtype), []
    if "block_table" in call:
        cache = cache[call["block_table"].long()].flatten(1, 2)
    for row, length in enumerate(call["cache_seqlens"].tolist()):
        first = leftpad[row] if leftpad else 0
        keys = cache[row, first:length, 0]

        def attend(q: Tensor, keys: Tensor = keys) -> Tensor:
            count = len(q)
            ahead = torch.arange(len(keys)) - torch.arange(len(keys) - count, len(keys))[:, None]
            hidden = (ahead > 0) | (ahead < -window if window >= 0 else torch.zeros_like(ahead, dtype=torch.bool))
            logits = torch.einsum("qhd,kd->hqk", q * q.shape[-1] ** -0.5, keys).masked_fill(hidden, -torch.inf)
            weights = logits.softmax(-1).nan_to_num()
            return torch.einsum("hqk,kd->qhd", weights, keys[:, : call["width"]])

        out = attend(call["q1"][row].to(dtype))
        if call["q2"] is not None:
            noise = attend(call["q2"][row].to(dtype)).repeat_interleave(out.shape[1] // call["q2"].shape[2], dim=1)
            out = out - call["lam"][row, :, :, None].to(dtype) * noise
        outs.append(out)
    return torch.stack(outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("case", "queries", "paged"),
    [(MOTIF, 1, False), (MOTIF, 3, True), (ODD, 2, False), (DEEPSEEK, 1, True), (UNROTATED, 2, False)],
)
def test_error_rule(case, queries, paged, dtype, backend, in_place):
    """Rows of many lengths, one that holds its new tokens alone, and one that holds nothing."""
    call = call_of(case, dtype, lengths=[41, queries, 17], queries=queries, paged=paged)
    out = decode(**call, backend=backend, num_splits=2)
    assert_error_rule(out, plain(call, dtype), plain(call, torch.float64))


@pytest.mark.parametrize(("leftpad", "window"), [((3, 0, 9), -1), ((0, 0, 0), 5), ((3, 0, 9), 5)])
def test_padding_and_windows(leftpad, window, backend, in_place):
    call = call_of(MOTIF, torch.float32, lengths=[41, 20, 17], queries=2)
    options = {"cache_leftpad": torch.tensor(leftpad, dtype=torch.int32), "window_size": (window, 0)}
    out = decode(**call, **options, backend=backend, num_splits=3)
    exact = plain(call, torch.float64, leftpad=leftpad, window=window)
    assert_error_rule(out, plain(call, torch.float32, leftpad=leftpad, window=window), exact)


def test_a_row_that_holds_nothing_gives_zero(backend, in_place):
    call = call_of(MOTIF, torch.float32, lengths=[9, 0], queries=1)
    out = decode(**call, backend=backend)
    assert torch.isfinite(out).all()
    assert (out[1] == 0).all()


def test_every_number_of_parts(in_place):
    """Each gives the same bits every time, and all the same numbers."""
    require_interpreter()
    call = call_of(MOTIF, torch.float32, lengths=[41, 7], queries=2)
    expected = plain(call, torch.float64)
    for splits in (1, 2, 3, 5):
        with tuning.overriding(decoding_latent_float32=TILES):
            first, second = (decode(**call, backend="triton", num_splits=splits) for _ in range(2))
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), expected, atol=2e-6, rtol=1e-5)


def test_new_tokens_and_the_epilogue(backend, in_place):
    """New latents written in place; the sub-norm, the gate and a soft cap."""
    call = call_of(MOTIF, torch.float32, lengths=[41, 20], queries=2)
    generator = torch.Generator().manual_seed(1)
    new, gate = torch.randn(2, 2, 1, 48, generator=generator), torch.randn(2, 2, 8, 32, generator=generator)
    after = call["cache"].clone()
    for row, length in enumerate((41, 20)):
        after[row, length : length + 2] = new[row]
    for epilogue in ({"gate": gate}, {"norm_weight": torch.rand(32)}, {"softcap": 3.0, "out_scale": 0.5}):
        cache = call["cache"].clone()
        out = decode(**(call | {"cache": cache}), k1=new, k2=new, v=new[..., :32], backend=backend, **epilogue)
        torch.testing.assert_close(cache, after, atol=0, rtol=0, equal_nan=True)
        for row, length in enumerate((43, 22)):
            own = epilogue | ({"gate": gate[row : row + 1]} if "gate" in epilogue else {})
            keys = after[row : row + 1, :length]
            q1, q2, lam = (call[name][row : row + 1] for name in ("q1", "q2", "lam"))
            whole = diff_attn_func(q1, keys, q2, keys, keys[..., :32], lam, causal=True, backend="reference", **own)
            torch.testing.assert_close(out[row : row + 1], whole, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_what_only_looks_like_latents(backend):
    """Values with a memory of their own are read, not what the keys begin with."""
    if backend == "triton":
        require_interpreter()
    call = call_of(Case(40, 8, 32, 16), torch.float32, lengths=[48, 20], queries=1)
    cache, lengths = call["cache"].nan_to_num(0.0, 0.0), call["cache_seqlens"]
    apart = torch.empty(2, PLACES, 1, 48).copy_(cache.flip(-1))[..., :32]
    inputs = AttentionInputs(call["q1"], cache, call["q2"], cache, apart, call["lam"])
    assert latent.may_be(inputs)
    assert not latent.is_latent(inputs)
    assert not latent.is_latent(inputs._replace(v=cache[..., 1:33]))
    assert not latent.is_latent(inputs._replace(k2=cache.clone(), v=cache[..., :32]))
    outs = [diff_attn_with_kvcache(*inputs[:6], lengths, causal=True, backend=b) for b in (backend, "reference")]
    torch.testing.assert_close(*outs, atol=5e-6, rtol=1e-5)


def test_offsets_past_31_bits():
    """A token, and a row, further from the first than 32 bits reach."""
    require_interpreter()
    call = call_of(MOTIF, torch.float16, lengths=[3, 3], queries=1)
    buffer = torch.empty(3 * 2**30 + 2**12, dtype=torch.float16)  # pages nobody touches cost nothing
    far = buffer.as_strided((2, 3, 1, 48), (2**30, 2**30, 48, 1))
    for row in range(2):  # rows share what lies at the same place
        for token in range(3):
            far[row, token] = call["cache"][0, row + token] if row + token < 3 else 0.25
    near = far.clone()
    outs = [decode(**(call | {"cache": cache}), backend="triton") for cache in (far, near)]
    assert torch.equal(*outs)


def test_grids_fit_any_number_of_rows(monkeypatch):
    require_interpreter()
    from motif_kernels.impl.triton import decoding_latent, decoding_parts

    grids: list[tuple[int, ...]] = []
    for module in (decoding_latent, decoding_parts):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    rows, q = 70_000, torch.zeros(70_000, 1, 4, 16)
    cache, lengths = torch.zeros(rows, 2, 1, 16), torch.ones(rows, dtype=torch.int32)
    inputs = AttentionInputs(q, cache, None, None, cache[..., :16], None)
    decoding_latent.attend(inputs, Cache(lengths, None, None, 3), AttentionOptions.of(16))
    assert len(grids) == 2
    for first, *others in grids:
        assert rows <= first < 2**31
        assert all(n <= 65_535 for n in others)


@pytest.mark.parametrize("reader", ["triton", "cpu", "packed"])
def test_opcheck(reader):
    if reader == "triton":
        require_interpreter()
    call = call_of(MOTIF, torch.float32, lengths=[PLACES, PLACES], queries=1)
    cache = call["cache"]
    inputs = AttentionInputs(call["q1"], cache, call["q2"], cache, cache[..., :32], call["lam"])
    options = AttentionOptions.of(48, causal=True)
    with tuning.overriding(decoding_latent_float32=TILES):
        arguments = (*inputs, *Cache(call["cache_seqlens"]), *options, reader, "sdpa")
        torch.library.opcheck(operator.attend_to_cache, arguments)


def test_compiled_without_breaks_it_still_reads_in_place(in_place):
    """What a compiled program hands to the operator still shares its memory."""
    call = call_of(MOTIF, torch.float32, lengths=[41, 20], queries=1)

    def step(q1, q2, lam, cache, lengths):
        return decode(q1, q2, lam, cache, lengths, 32)

    arguments = [call[name] for name in ("q1", "q2", "lam", "cache", "cache_seqlens")]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), step(*arguments), atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [Case(64, 16, 512, 64), Case(128, 0, 512, 64), Case(8, 2, 128, 64)])
def test_on_a_device(case, dtype):
    """The compiled kernels against float64, with the heads of Motif-3 and DeepSeek-V3."""
    generator = torch.Generator("cuda").manual_seed(0)
    width = case.latent + case.rotated
    cache = torch.randn(2, 4096, 1, width, generator=generator, device="cuda").to(dtype)
    q1 = torch.randn(2, 2, case.signals, width, generator=generator, device="cuda").to(dtype)
    q2 = lam = None
    if case.noises:
        q2 = torch.randn(2, 2, case.noises, width, generator=generator, device="cuda").to(dtype)
        lam = torch.rand(2, 2, case.signals, generator=generator, device="cuda")
    call = {"q1": q1, "q2": q2, "lam": lam, "cache": cache, "width": case.latent}
    call |= {"cache_seqlens": torch.tensor([4096, 333], dtype=torch.int32, device="cuda")}
    out = decode(**call, backend="triton").cpu()
    call = {n: t.cpu() if isinstance(t, Tensor) else t for n, t in call.items()}
    assert_error_rule(out, plain(call, dtype), plain(call, torch.float64))
