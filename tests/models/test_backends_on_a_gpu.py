"""Which attention models take for packed documents on a GPU that is a stand-in."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.flash_stand_ins import HOPPER, StandIn, installing
from helpers.models import packed, random_ids, tiny_config
from motif_kernels import dispatch, tuning
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences
from motifarch.models.motif import MotifForCausalLM

VARIANTS = ["softmax", "gda", "gda 4:1", "diff_v1", "diff_v2"]
WINDOW = {"sliding_window": 7, "use_sliding_window": True}


class Operators(TorchDispatchMode):
    """Notes which of the package's attention operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "motif" and "attention" in func._schema.name:
            self.called.append(func._schema.name.removeprefix("motif::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn | None]]:
    """Makes this a Hopper GPU without a measured table, with these generations of flash-attn."""
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr("motif_kernels.dispatch.is_gpu", lambda device: True)
    monkeypatch.setattr("motif_kernels.checks.may_read", lambda values: False)
    with installing(monkeypatch) as install:
        yield partial(install, HOPPER)


def operators_of(variant: str, dtype: torch.dtype, **overrides: Any) -> list[str]:
    """The attention operators of a training model's forward pass over packed documents.

    Reading their bounds (``cu_seqlens.tolist()``), which waits for a GPU, raises here: nothing has
    data.
    """
    batch = packed([random_ids(12), random_ids(5, seed=2)])
    with torch.device("meta"):
        model = MotifForCausalLM(tiny_config(variant, **overrides)).to(dtype).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Operators() as operators:
        model.to_empty(device="cpu")
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        model.model(**fake, use_cache=False)
    return operators.called


@pytest.mark.parametrize("overrides", [{}, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_variant_takes_the_fused_kernel(dtype, overrides, hopper):
    hopper()
    for variant in VARIANTS:
        assert operators_of(variant, dtype, **overrides) == ["diff_attention"] * 2, variant


@pytest.mark.parametrize("overrides", [{}, WINDOW], ids=["full", "window"])
def test_every_variant_takes_flash_attn_where_it_is_installed(overrides, hopper):
    """One call of each layer for softmax attention, and otherwise one for each map."""
    library = hopper(2)
    for variant in VARIANTS:
        library.calls.clear()
        assert operators_of(variant, torch.bfloat16, **overrides) == [], variant
        assert all(call["packed"] for call in library.calls)
        assert len(library.calls) == 2 * (1 if variant == "softmax" else 2), variant


@pytest.mark.parametrize(
    ("versions", "dtype", "packed", "window", "options", "expected"),
    [
        ((2,), torch.bfloat16, False, (-1, 0), {}, "flash"),
        ((), torch.bfloat16, False, (-1, 0), {}, "sdpa"),
        ((), torch.bfloat16, False, (9, 0), {}, "triton"),
        ((), torch.bfloat16, True, (-1, 0), {}, "triton"),
        ((2,), torch.float32, False, (-1, 0), {}, "sdpa"),
        ((2,), torch.float32, True, (-1, 0), {}, "triton"),  # torch's attention would wait for the bounds
        ((2,), torch.bfloat16, True, (-1, 0), {"return_max_logits": True}, "triton"),
        ((), torch.bfloat16, False, (-1, 0), {"softcap": 20.0}, "triton"),
        ((), torch.float64, True, (-1, 0), {}, "reference"),
    ],
)
@pytest.mark.parametrize("noise", [True, False])
def test_what_auto_takes(noise, versions, dtype, packed, window, options, expected, hopper):
    """Without a measured table; one that there is wins for differential attention in 16 bits."""
    hopper(*versions)
    q = torch.empty(*((8,) if packed else (1, 8)), 2, 64, dtype=dtype, requires_grad=True)
    inputs = AttentionInputs(q, q, *((q, q, q, torch.ones(())) if noise else (None, None, q, None)))
    bounds = torch.tensor([0, 8], dtype=torch.int32) if packed else None
    call = inputs, Sequences(8, 8, bounds, bounds), AttentionOptions.of(64, window_size=window, **options)
    assert dispatch.choose("auto", *call) == expected
    with tuning.overriding(attention_backend={"up_to": None, "backend": "triton"}):
        assert dispatch.choose("auto", *call) == ("triton" if noise and dtype == torch.bfloat16 else expected)
