"""Dtypes under autocast: attention gives that of its queries on every backend; norms, as PyTorch's,
give float32 where autocast is CUDA's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.flash_stand_ins import HOPPER, installing
from helpers.interpreter import require_interpreter, small_tiles
from motif_kernels import (
    diff_attn_func,
    diff_attn_varlen_func,
    diff_attn_with_kvcache,
    diff_combine,
    mul_poly_norm,
    poly_norm,
)
from motif_kernels.impl.flash import libraries

BACKENDS = ["reference", "cpu", "sdpa", "flash", "triton"]
NARROW = (torch.float16, torch.bfloat16)
S, HEADS, NOISE, D, DV = 6, 4, 2, 16, 32


@contextmanager
def autocast_on(device: str) -> Iterator[None]:
    """As ``torch.autocast``, which asks for a GPU that can be used."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def calls(backend: str, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """Each attention function, with the sub-norm."""

    def tensor(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    q1, q2, k, v = tensor(1, S, HEADS, D), tensor(1, S, NOISE, D), tensor(1, S, NOISE, D), tensor(1, S, NOISE, DV)
    options: dict[str, Any] = {"causal": True, "norm_weight": torch.ones(DV, device=device), "backend": backend}
    bounds = torch.tensor([0, 2, S], dtype=torch.int32, device=device)
    lengths = torch.full((1,), S, dtype=torch.int32, device=device)
    packed = [t[0] for t in (q1, k, q2, k, v)]
    return {
        "dense": lambda: diff_attn_func(q1, k, q2, k, v, 0.3, **options),
        "window": lambda: diff_attn_func(q1, k, q2, k, v, 0.3, window_size=(2, 0), **options),
        "packed": lambda: diff_attn_varlen_func(*packed, 0.3, bounds, bounds, S, S, **options),
        "decoding": lambda: diff_attn_with_kvcache(q1[:, :1], k, q2[:, :1], k, v, 0.3, lengths, **options),
        "many queries decoding": lambda: diff_attn_with_kvcache(q1, k, q2, k, v, 0.3, lengths, **options),
    }


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "triton":
        require_interpreter()
    with small_tiles(), installing(monkeypatch) as install:
        install(HOPPER, 2)
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_gives_its_queries_dtype_and_numbers(backend: str, dtype: torch.dtype) -> None:
    if backend == "flash" and dtype not in NARROW:
        pytest.skip("flash-attn takes narrow dtypes")
    for name, call in calls(backend, dtype, "cpu").items():
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            out = call()
        assert out.dtype == dtype, name
        assert torch.equal(out, expected), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["reference", "sdpa", "flash", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_gives_its_queries_dtype(name: str, dtype: torch.dtype) -> None:
    if name == "flash" and (dtype not in NARROW or libraries.installed() is None):
        pytest.skip("flash-attn takes narrow dtypes, where it is installed")
    for kind, call in calls(name, dtype, "cuda").items():
        with torch.autocast("cuda", torch.bfloat16):
            assert call().dtype == dtype, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "norms"), [("cuda", torch.float32), ("cpu", None)])
def test_norms_do_as_layer_norm_does(device: str, norms: torch.dtype | None, dtype: torch.dtype) -> None:
    with FakeTensorMode() if device == "cuda" else nullcontext(), autocast_on(device):
        x, noise = (torch.ones(1, 3, h, 8, dtype=dtype, device=device) for h in (2, 1))
        three, one, eight = (torch.ones(n, device=device) for n in (3, 1, 8))
        layer_norm = torch.nn.functional.layer_norm(x, (8,)).dtype
        assert layer_norm == (norms or dtype)
        assert poly_norm(x, three, one).dtype == layer_norm
        assert mul_poly_norm(x, x, three, one).dtype == layer_norm
        assert diff_combine(x, noise, 0.5, norm_weight=eight).dtype == layer_norm
        assert diff_combine(x, noise, 0.5).dtype == dtype
