"""Attention against a cache: what the whole sequence gives for its last tokens."""

from __future__ import annotations

import pytest
import torch

from motif_kernels import diff_attn_func, diff_attn_with_kvcache, tuning

LENGTHS = [23, 7, 40]  # of whole sequences, the new tokens included
CAPACITY = 48
PAGE = 8


def sequences(dtype=torch.float64):
    """For each row q1, k1, q2, k2, v, lam of a whole sequence, (1, S, H, width): 4 signal and 2 noise heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(1, *shape, generator=generator, dtype=dtype)

    return [
        [normal(n, 4, 8), normal(n, 2, 8), normal(n, 2, 8), normal(n, 2, 8), normal(n, 1, 16), normal(n, 4).sigmoid()]
        for n in LENGTHS
    ]


def caches(rows, new, leftpad=(0, 0, 0)):
    """Keys and values of all but the last ``new`` tokens, (B, CAPACITY, H, width) with NaN where there is nothing."""
    built = []
    for i in (1, 3, 4):
        cache = torch.full((3, CAPACITY, *rows[0][i].shape[2:]), torch.nan, dtype=rows[0][i].dtype)
        for b, row in enumerate(rows):
            held = LENGTHS[b] - new
            cache[b, leftpad[b] : leftpad[b] + held] = row[i][0, :held]
        built.append(cache)
    seqlens = torch.tensor([n - new + pad for n, pad in zip(LENGTHS, leftpad, strict=True)], dtype=torch.int32)
    return built, seqlens


def last(rows, i, count):
    return torch.cat([row[i][:, row[i].shape[1] - count :] for row in rows])


def paged(cache, table):
    """The same cache in blocks, in the table's order, among blocks of NaN."""
    blocks = torch.full((24, PAGE, *cache.shape[2:]), torch.nan, dtype=cache.dtype)
    blocks[table.long()] = cache.unflatten(1, (-1, PAGE))
    return blocks


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [(-1, -1), (9, 0)])
@pytest.mark.parametrize("leftpad", [(0, 0, 0), (3, 8, 0)])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("new", [1, 4])
def test_last_tokens_of_the_whole_sequence(new, is_paged, leftpad, window, backend):
    rows = sequences()
    (k1, k2, v), seqlens = caches(rows, new, leftpad)
    table = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:18].view(3, 6).int() if is_paged else None
    if table is not None:
        k1, k2, v = (paged(c, table) for c in (k1, k2, v))
    options = {"causal": True, "window_size": window, "norm_weight": torch.rand(16, dtype=torch.float64)}
    out = diff_attn_with_kvcache(
        last(rows, 0, new),
        k1,
        last(rows, 2, new),
        k2,
        v,
        last(rows, 5, new),
        seqlens,
        k1=last(rows, 1, new),
        k2=last(rows, 3, new),
        v=last(rows, 4, new),
        block_table=table,
        cache_leftpad=torch.tensor(leftpad, dtype=torch.int32),
        backend=backend,
        **options,
    )
    whole = torch.cat([diff_attn_func(*row, backend="reference", **options)[:, -new:] for row in rows])
    torch.testing.assert_close(out, whole, atol=1e-10, rtol=1e-10)


@pytest.fixture
def small_parts():
    """Splits that even these caches are long enough for."""
    decoding = pytest.importorskip("motif_kernels.triton.decoding", reason="the Triton kernels need triton")
    if not decoding.triton.knobs.runtime.interpret:
        pytest.skip("with a GPU, Triton kernels are compiled in this process, not interpreted")
    with tuning.overriding(decoding_split={"block_n": 16, "num_warps": 4, "num_stages": 1}):
        yield


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("window", [(-1, -1), (9, 0)])
@pytest.mark.parametrize("leftpad", [(0, 0, 0), (3, 8, 0)])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("new", [1, 4])
def test_the_kernel_reads_the_cache_in_place(new, is_paged, leftpad, window, num_splits, small_parts):
    """Interpreted, in float32, with two noise heads to a key head."""
    rows = sequences(torch.float32)
    (k1, k2, v), seqlens = caches(rows, new, leftpad)
    fresh = [last(rows, i, new) for i in (1, 3, 4)]
    k1, k2, fresh[0], fresh[1] = (t[:, :, :1] for t in (k1, k2, fresh[0], fresh[1]))
    table = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:18].view(3, 6).int() if is_paged else None
    if table is not None:
        k1, k2, v = (paged(c, table) for c in (k1, k2, v))
    arguments = (last(rows, 0, new), last(rows, 2, new), last(rows, 5, new))
    options = {"causal": True, "window_size": window, "norm_weight": torch.rand(16), "out_scale": 0.7, "softcap": 4.0}
    results = []
    for backend in ("triton", "reference"):
        caches_ = [c.clone() for c in (k1, k2, v)]
        results.append(
            diff_attn_with_kvcache(
                arguments[0],
                caches_[0],
                arguments[1],
                *caches_[1:],
                arguments[2],
                seqlens,
                **dict(zip(("k1", "k2", "v"), fresh, strict=True)),
                block_table=table,
                cache_leftpad=torch.tensor(leftpad, dtype=torch.int32),
                num_splits=num_splits,
                backend=backend,
                **options,
            )
        )
    torch.testing.assert_close(*results, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("lam", "epilogue"), [((), "gate"), ("heads", "none"), ("token", "norm")])
def test_the_kernel_serves_every_variant(ratio, lam, epilogue, small_parts):
    """Against the training kernel's last tokens, in float16."""
    generator = torch.Generator().manual_seed(0)
    heads = 4 * ratio

    def normal(*shape):
        return torch.randn(shape, generator=generator).half()

    q1, q2 = normal(2, 40, heads, 16), normal(2, 40, 4, 16)
    k1, k2, v = normal(2, 40, 2, 16), normal(2, 40, 2, 16), normal(2, 40, 2, 32)
    shape = {"heads": (heads,), "token": (2, 40, heads)}.get(lam, ())
    lam = torch.rand(shape, generator=generator)
    whole = {"gate": normal(2, 40, heads, 32)} if epilogue == "gate" else {}
    last_gate = {"gate": whole["gate"][:, -2:]} if whole else {}
    options = {"causal": True, "norm_weight": torch.rand(32, generator=generator) if epilogue == "norm" else None}
    expected = diff_attn_func(q1, k1, q2, k2, v, lam, backend="triton", **whole, **options)[:, -2:]
    lengths = torch.full((2,), 40, dtype=torch.int32)
    out = diff_attn_with_kvcache(
        q1[:, -2:],
        k1,
        q2[:, -2:],
        k2,
        v,
        lam[:, -2:] if lam.ndim == 3 else lam,
        lengths,
        num_splits=2,
        backend="triton",
        **last_gate,
        **options,
    )
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


def test_new_tokens_are_written_into_the_cache_and_nothing_else():
    rows = sequences()
    (k1, k2, v), seqlens = caches(rows, 2)
    before = k1.clone()
    arguments = (last(rows, 0, 2), k1, last(rows, 2, 2), k2, v, 0.3)
    first = diff_attn_with_kvcache(
        *arguments, seqlens, k1=last(rows, 1, 2), k2=last(rows, 3, 2), v=last(rows, 4, 2), causal=True
    )
    for b, n in enumerate(LENGTHS):
        assert torch.equal(k1[b, n - 2 : n], rows[b][1][0, -2:])
        before[b, n - 2 : n] = k1[b, n - 2 : n]
    torch.testing.assert_close(k1, before, atol=0, rtol=0, equal_nan=True)
    again = diff_attn_with_kvcache(*arguments, seqlens + 2, causal=True)  # they are there now
    assert torch.equal(again, first)


def test_an_empty_cache_gives_zero():
    rows = sequences()
    (k1, k2, v), _ = caches(rows, 1)
    none = torch.zeros(3, dtype=torch.int32)
    assert (diff_attn_with_kvcache(last(rows, 0, 1), k1, last(rows, 2, 1), k2, v, 0.3, none) == 0).all()


def test_refuses_with_a_reason():
    rows = sequences()
    (k1, k2, v), seqlens = caches(rows, 1)
    arguments = [last(rows, 0, 1), k1, last(rows, 2, 1), k2, v, 0.3, seqlens]
    new = {"k1": last(rows, 1, 1), "k2": last(rows, 3, 1), "v": last(rows, 4, 1)}
    with pytest.raises(ValueError, match="48 and 1 tokens are to be appended, but a row's cache has room for 48"):
        diff_attn_with_kvcache(*arguments[:6], torch.tensor([3, 4, 48], dtype=torch.int32), **new)
    with pytest.raises(ValueError, match="must be given together"):
        diff_attn_with_kvcache(*arguments, k1=new["k1"])
    with pytest.raises(TypeError, match=r"cache_seqlens is torch\.int64"):
        diff_attn_with_kvcache(*arguments[:6], seqlens.long())
    with pytest.raises(ValueError, match=r"cache_seqlens has shape \(2,\)"):
        diff_attn_with_kvcache(*arguments[:6], seqlens[:2])
    with pytest.raises(ValueError, match="cache_leftpad holds -1"):
        diff_attn_with_kvcache(*arguments, cache_leftpad=-torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="block_table names block 3; the cache has blocks 0 to 2"):
        diff_attn_with_kvcache(*arguments, block_table=torch.full((3, 1), 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="k1_cache has 2 rows and q1 has 3"):
        diff_attn_with_kvcache(arguments[0], k1[:2], *arguments[2:])
