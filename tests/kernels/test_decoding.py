"""Attention against a cache: what the whole sequence gives for its last tokens."""

import importlib

import pytest
import torch

from helpers.interpreter import require_interpreter, small_tiles
from helpers.numerics import assert_error_rule
from helpers.plain_attention import plain_diff_attention
from motif_kernels import diff_attn_func, diff_attn_with_kvcache
from motif_kernels.ops import decoding as operator
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache

LENGTHS = [23, 7, 40]  # of whole sequences, the new tokens included
CAPACITY = 48
PAGE = 8
OPTIONS = AttentionOptions(softmax_scale=0.25, left=-1, right=0, norm_eps=1e-5, out_scale=1.0, deterministic=True)


def sequences(dtype=torch.float64):
    """Each row's q1, k1, q2, k2, v, lam, (1, S, H, width): 4 signal and 2 noise heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(1, *shape, generator=generator, dtype=dtype)

    return [
        [normal(n, 4, 8), normal(n, 2, 8), normal(n, 2, 8), normal(n, 2, 8), normal(n, 1, 16), normal(n, 4).sigmoid()]
        for n in LENGTHS
    ]


def caches(rows, new, leftpad=(0, 0, 0)):
    """Keys and values but the last ``new`` tokens', (B, CAPACITY, H, width), else NaN."""
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


def attend_to_last(rows, new, is_paged, leftpad, *, kv_heads=2, **options):
    """The last ``new`` tokens of the rows, appended to caches of those before and attended from."""
    (k1, k2, v), seqlens = caches(rows, new, leftpad)
    table = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:18].view(3, 6).int() if is_paged else None
    if table is not None:
        k1, k2, v = (paged(c, table) for c in (k1, k2, v))
    return diff_attn_with_kvcache(
        last(rows, 0, new),
        k1[:, :, :kv_heads],
        last(rows, 2, new),
        k2[:, :, :kv_heads],
        v,
        last(rows, 5, new),
        seqlens,
        k1=last(rows, 1, new)[:, :, :kv_heads],
        k2=last(rows, 3, new)[:, :, :kv_heads],
        v=last(rows, 4, new),
        block_table=table,
        cache_leftpad=torch.tensor(leftpad, dtype=torch.int32),
        **options,
    )


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [(-1, -1), (9, 0)])
@pytest.mark.parametrize("leftpad", [(0, 0, 0), (3, 8, 0)])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("new", [1, 4])
def test_last_tokens_of_the_whole_sequence(new, is_paged, leftpad, window, backend):
    rows = sequences()
    options = {"causal": True, "window_size": window, "norm_weight": torch.rand(16, dtype=torch.float64)}
    out = attend_to_last(rows, new, is_paged, leftpad, backend=backend, **options)
    whole = torch.cat([diff_attn_func(*row, backend="reference", **options)[:, -new:] for row in rows])
    torch.testing.assert_close(out, whole, atol=1e-10, rtol=1e-10)


@pytest.fixture(params=["triton", "sdpa"])
def in_place(request):
    """The backends that read a cache as it lies; the kernel interpreted, in parts."""
    if request.param == "triton":
        require_interpreter()
    with small_tiles():
        yield request.param


@pytest.mark.parametrize(
    ("in_place", "num_splits"), [("sdpa", None), ("triton", None), ("triton", 1), ("triton", 3)], indirect=["in_place"]
)
@pytest.mark.parametrize("window", [(-1, -1), (9, 0)])
@pytest.mark.parametrize("leftpad", [(0, 0, 0), (3, 8, 0)])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_caches_read_in_place(new, is_paged, leftpad, window, num_splits, softcap, in_place):
    """In float32, with two noise heads to a key head."""
    rows = sequences(torch.float32)
    options = {"causal": True, "window_size": window, "norm_weight": torch.rand(16), "out_scale": 0.7}
    options |= {"softcap": softcap, "num_splits": num_splits, "kv_heads": 1}
    results = [attend_to_last(rows, new, is_paged, leftpad, backend=b, **options) for b in (in_place, "reference")]
    torch.testing.assert_close(*results, atol=5e-6, rtol=1e-5)


LAYOUTS = ["apart", "side by side", "shared"]


def keys_in_layout(layout, normal, *shape):
    """k1 and k2 as caches hold them: apart, as halves of one (GDA), or one (DIFF V2)."""
    if layout == "side by side":
        return normal(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)
    k1 = normal(*shape)
    return k1, k1 if layout == "shared" else normal(*shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("lam", "epilogue"), [((), "gate"), ("heads", "none"), ("token", "norm")])
def test_error_rule_of_the_last_tokens_for_every_variant(ratio, lam, epilogue, layout, in_place):
    """In float16: as near to float64 as plain PyTorch, and as what the training kernel gives."""
    generator = torch.Generator().manual_seed(0)
    heads = 4 * ratio

    def normal(*shape):
        return torch.randn(shape, generator=generator).half()

    q1, q2 = normal(2, 40, heads, 16), normal(2, 40, 4, 16)
    k1, k2 = keys_in_layout(layout, normal, 2, 40, 2, 16)
    v = normal(2, 40, 2, 16 if layout == "shared" else 32)
    shape = {"heads": (heads,), "token": (2, 40, heads)}.get(lam, ())
    lam = torch.rand(shape, generator=generator)
    whole = {"gate": normal(2, 40, heads, v.shape[-1])} if epilogue == "gate" else {}
    last_gate = {"gate": whole["gate"][:, -2:]} if whole else {}
    norm_weight = torch.rand(v.shape[-1], generator=generator) if epilogue == "norm" else None
    last_lam, lengths = lam[:, -2:] if lam.ndim == 3 else lam, torch.full((2,), 40, dtype=torch.int32)
    options = {"num_splits": 2, "backend": in_place, "causal": True, "norm_weight": norm_weight} | last_gate
    out = diff_attn_with_kvcache(q1[:, -2:], k1, q2[:, -2:], k2, v, last_lam, lengths, **options)
    arguments = (q1, k1, q2, k2, v)
    training = diff_attn_func(*arguments, lam, causal=True, norm_weight=norm_weight, backend=in_place, **whole)
    double = [t.double() for t in arguments]
    wide = {n: t.double() for n, t in (whole | ({} if norm_weight is None else {"norm_weight": norm_weight})).items()}
    exact = plain_diff_attention(*double, lam.double(), causal=True, **wide)[:, -2:]
    narrow = {"norm_weight": norm_weight.half()} if norm_weight is not None else whole
    plain = plain_diff_attention(*arguments, lam.half(), causal=True, **narrow)[:, -2:]
    assert_error_rule(out, plain, exact)
    torch.testing.assert_close(out, training[:, -2:], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("backend", ["sdpa", "reference", "triton"])
def test_a_long_chunk_of_new_tokens(backend):
    """More queries than decoding takes go through the training functions."""
    if backend == "triton":
        pytest.importorskip("triton", reason="the Triton kernels need triton")
    generator = torch.Generator().manual_seed(0)
    q1, q2, k, v = (torch.randn(2, 40, h, w, generator=generator) for h, w in ((8, 16), (2, 16), (2, 16), (2, 32)))
    lengths = torch.tensor([40, 33], dtype=torch.int32)
    out = diff_attn_with_kvcache(q1[:, :30], k, q2[:, :30], k, v, 0.3, lengths, causal=True, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        keys, values = k[b : b + 1, :length], v[b : b + 1, :length]
        queries = q1[b : b + 1, :30], q2[b : b + 1, :30]
        expected = diff_attn_func(queries[0], keys, queries[1], keys, values, 0.3, causal=True, backend="reference")
        torch.testing.assert_close(out[b : b + 1], expected, atol=1e-5, rtol=1e-5)


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
    with pytest.raises(ValueError, match="k1 has batch size 2 and q1 has 3"):
        diff_attn_with_kvcache(arguments[0], k1[:2], arguments[2], k2[:2], v[:2], *arguments[5:])
    with pytest.raises(ValueError, match="cache_seqlens holds 49, but a row's cache has room for 48"):
        diff_attn_with_kvcache(*arguments[:6], torch.tensor([3, 49, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="cache_seqlens holds -2"):
        diff_attn_with_kvcache(*arguments[:6], torch.tensor([3, -2, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"k1 has shape \(3, 1, 1, 8\); it must be \(3, 1, 2, 8\)"):
        diff_attn_with_kvcache(*arguments, **(new | {"k1": new["k1"][:, :, :1]}))
    with pytest.raises(TypeError, match=r"v is torch\.float32"):
        diff_attn_with_kvcache(*arguments, **(new | {"v": new["v"].float()}))
    with pytest.raises(ValueError, match="backend 'fast' is not one of"):
        diff_attn_with_kvcache(*arguments, backend="fast")
    with pytest.raises(ValueError, match="backend 'triton' cannot serve dtype"):
        diff_attn_with_kvcache(*arguments, backend="triton")


def test_a_refused_append_has_written_nothing():
    rows = sequences()
    (k1, k2, v), _ = caches(rows, 1)
    before = [t.clone() for t in (k1, k2, v)]
    new = {"k1": last(rows, 1, 1), "k2": last(rows, 3, 1), "v": last(rows, 4, 1)}
    full = torch.tensor([3, 4, CAPACITY], dtype=torch.int32)
    with pytest.raises(ValueError, match="has room for 48"):
        diff_attn_with_kvcache(last(rows, 0, 1), k1, last(rows, 2, 1), k2, v, 0.3, full, **new)
    for cache, was in zip((k1, k2, v), before, strict=True):
        torch.testing.assert_close(cache, was, atol=0, rtol=0, equal_nan=True)


def interpreted(name):
    require_interpreter()
    return importlib.import_module(f"motif_kernels.impl.triton.{name}")


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
def test_the_append_kernel_writes_what_has_room_and_nothing_else(is_paged, heads_first):
    """Lengths and pages that lie: a GPU does not look at them before it writes."""
    append = interpreted("cache_append").append
    generator = torch.Generator().manual_seed(0)
    room = torch.full((5, 3, 8, 6), torch.nan) if heads_first else torch.full((5, 8, 3, 6), torch.nan)
    whole = room.transpose(1, 2) if heads_first else room
    cache = whole[1:4]  # what lies before and behind belongs to others
    tokens = torch.randn(2, 3, 3, 6, generator=generator)
    if is_paged:  # rows of two pages of 8; the second row's second page lies outside the pool
        lengths, table = torch.tensor([6, 7], dtype=torch.int32), torch.tensor([[2, 0], [1, 7]], dtype=torch.int32)
        written = {(0, 0): (2, 6), (0, 1): (2, 7), (0, 2): (0, 0), (1, 0): (1, 7)}
    else:
        lengths, table = torch.tensor([2, 6], dtype=torch.int32), None
        written = {(0, 0): (0, 2), (0, 1): (0, 3), (0, 2): (0, 4), (1, 0): (1, 6), (1, 1): (1, 7)}
    append(cache, tokens, lengths, table)
    expected = torch.full((5, 8, 3, 6), torch.nan)
    for (row, token), (page, slot) in written.items():
        expected[1 + page, slot] = tokens[row, token]
    torch.testing.assert_close(whole, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("has_noise", [True, False])
@pytest.mark.parametrize("is_paged", [False, True])
def test_the_kernel_reads_no_further_than_the_cache(is_paged, has_noise):
    """A length past the cache is its end, a page outside the pool its first or last."""
    attend = interpreted("decoding").attend
    generator = torch.Generator().manual_seed(0)
    whole = torch.full((5, 16, 1, 16), torch.nan)
    cache = whole[1:4]
    cache.copy_(torch.randn(cache.shape, generator=generator))
    q = torch.randn(3, 1, 2, 16, generator=generator)
    lengths = torch.tensor([16, 100, 1 << 30], dtype=torch.int32)
    table = torch.tensor([[0], [-3], [99]], dtype=torch.int32) if is_paged else None

    def result(lengths, table, leftpad):
        noise = (q[:, :, :1], cache, torch.tensor(0.3)) if has_noise else (None, None, None)
        inputs = AttentionInputs(q, cache, *noise[:2], cache, noise[2])
        return attend(inputs, Cache(lengths, leftpad, table, 2), OPTIONS)

    held = torch.full((3,), 16, dtype=torch.int32)
    clean = torch.tensor([[0], [0], [2]], dtype=torch.int32) if is_paged else None
    lying = result(lengths, table, torch.full((3,), -5, dtype=torch.int32))
    assert torch.equal(lying, result(held, clean, None))
    assert torch.isfinite(lying).all()


@pytest.mark.parametrize("has_noise", [True, False])
def test_more_parts_than_the_merge_holds_at_once(has_noise):
    """The last of them are not empty; the row has fewer tokens than the cache has room for."""
    require_interpreter()
    generator = torch.Generator().manual_seed(0)
    q1, q2, k, v = (
        torch.randn(1, n, h, w, generator=generator)
        for n, h, w in ((1, 2, 16), (1, 1, 16), (1152, 1, 16), (1152, 1, 256))
    )
    noise = (q2, k.roll(1, dims=1), torch.tensor([0.3, 0.6])) if has_noise else (None, None, None)
    arguments = (q1, k, *noise[:2], v, noise[2], torch.tensor([1100], dtype=torch.int32))
    options = {"causal": True, "norm_weight": torch.rand(256, generator=generator)}
    with small_tiles():
        out = diff_attn_with_kvcache(*arguments, num_splits=72, backend="triton", **options)
    expected = diff_attn_with_kvcache(*arguments, backend="reference", **options)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["decoding", "cache_append"])
def test_grids_fit_any_number_of_rows(kernels, monkeypatch):
    """CUDA's grids have 2^31 - 1 programs along the first axis and 65,535 along the others."""
    module, rows = interpreted(kernels), 70_000
    grids = []
    for launching in (module, interpreted("decoding_parts")):
        monkeypatch.setattr(launching, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    lengths = torch.ones(rows, dtype=torch.int32)
    cache = torch.zeros(rows, 2, 1, 16)
    if kernels == "decoding":
        q = torch.zeros(rows, 1, 4, 16)
        module.attend(AttentionInputs(q, cache, None, None, cache, None), Cache(lengths, None, None, 3), OPTIONS)
    else:
        module.append(cache, cache[:, :1], lengths, None)
    assert len(grids) == (2 if kernels == "decoding" else 1)
    for first, *others in grids:
        assert rows <= first < 2**31
        assert all(n <= 65_535 for n in others)


@pytest.mark.parametrize("is_paged", [False, True])
def test_opcheck(is_paged):
    rows = sequences(torch.float32)
    (k1, k2, v), seqlens = caches(rows, 1)
    k1, k2, v = (torch.nan_to_num(t) for t in (k1[:, :, :1], k2[:, :, :1], v))
    table = torch.randperm(24)[:18].view(3, 6).int() if is_paged else None
    if table is not None:
        k1, k2, v = (torch.nan_to_num(paged(c, table)) for c in (k1, k2, v))
    torch.library.opcheck(operator.append_to_cache, (v, last(rows, 4, 1), seqlens, table))
    q1, q2, lam = (last(rows, i, 1) for i in (0, 2, 5))
    for inputs in (AttentionInputs(q1, k1, q2, k2, v, lam), AttentionInputs(q1, k1, None, None, v, None)):
        for reader, backend in (("cpu", "sdpa"), ("packed", "sdpa"), ("packed", "reference")):
            arguments = (*inputs, *Cache(seqlens, None, table), *OPTIONS, reader, backend)
            torch.library.opcheck(operator.attend_to_cache, arguments)


def test_compiled_without_breaks_and_once_for_all_lengths():
    """A decoding loop over a cache that appends in place: one graph, while the lengths grow."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    cache = torch.zeros(3, CAPACITY, 2, 32)  # k1, k2 and v side by side
    reference = cache.clone()

    def step(cache, q1, q2, new, lengths):
        k1, k2, v = cache.split((8, 8, 16), dim=-1)
        n1, n2, nv = new.split((8, 8, 16), dim=-1)
        return diff_attn_with_kvcache(q1, k1, q2, k2, v, 0.3, lengths, k1=n1, k2=n2, v=nv, causal=True)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for t in range(12):
        generator = torch.Generator().manual_seed(t)
        q1, q2, new = (torch.randn(3, 1, h, w, generator=generator) for h, w in ((4, 8), (2, 8), (2, 32)))
        lengths = torch.tensor([t, t + 3, t + 9], dtype=torch.int32)
        out = compiled(cache, q1, q2, new, lengths)
        assert torch.equal(out, step(reference, q1, q2, new, lengths))
        assert torch.equal(cache, reference)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_device(dtype, is_paged):
    """The compiled kernels against float64, in place, with real widths and long caches."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    page, pages = (256, 33) if is_paged else (8448, 1)
    k = normal(4 * pages, page, 2, 256)
    v = normal(4 * pages, page, 2, 256)
    table = torch.randperm(4 * pages, generator=torch.Generator().manual_seed(0)).view(4, pages).int().cuda()
    lengths = torch.tensor([8447, 1, 300, 4096], dtype=torch.int32, device="cuda")
    k1, k2 = k.chunk(2, dim=-1)
    q1, q2, lam = normal(4, 1, 8, 128), normal(4, 1, 2, 128), torch.rand(4, 1, 8, device="cuda")
    n1, n2, nv = normal(4, 1, 2, 128), normal(4, 1, 2, 128), normal(4, 1, 2, 256)
    norm_weight = torch.rand(256, device="cuda")
    options = {"block_table": table if is_paged else None, "causal": True, "norm_weight": norm_weight}
    new = {"k1": n1, "k2": n2, "v": nv}
    out = diff_attn_with_kvcache(q1, k1, q2, k2, v, lam, lengths, **new, **options, backend="triton")
    for b, length in enumerate((lengths + 1).tolist()):
        if is_paged:
            held = [t[table[b].long()].flatten(0, 1)[None, :length] for t in (k1, k2, v)]
        else:
            held = [t[b : b + 1, :length] for t in (k1, k2, v)]
        for cached, fresh in zip(held, (n1, n2, nv), strict=True):
            assert torch.equal(cached[0, -1], fresh[b, 0])
        row = (q1[b : b + 1], held[0], q2[b : b + 1], held[1], held[2])
        plain = plain_diff_attention(*row, lam[b : b + 1].to(dtype), causal=True, norm_weight=norm_weight.to(dtype))
        wide = [t.double() for t in row]
        exact = plain_diff_attention(*wide, lam[b : b + 1].double(), causal=True, norm_weight=norm_weight.double())
        assert_error_rule(out[b : b + 1], plain, exact)
