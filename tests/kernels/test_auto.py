"""What "auto" takes on a GPU that is a stand-in, over the whole grid of calls."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from helpers.flash_stand_ins import BLACKWELL, HOPPER, installing
from motif_kernels import dispatch, tuning
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences

NARROW = (torch.float16, torch.bfloat16)


def rule(flash, kernels, dtype, packed, window, training, noise, measured):
    """Written out again, from what is promised to users."""
    able = {
        "flash": flash and dtype in NARROW,
        "triton": kernels and dtype != torch.float64,
        "sdpa": not (packed and training),  # it would wait for the GPU to tell where documents end
    }
    if noise and dtype in NARROW and able.get(measured):
        return measured
    if dtype in NARROW:
        second, third = ("triton", "sdpa") if packed or window else ("sdpa", "triton")
        order = ["flash", second, third]
    else:
        order = ["sdpa", "triton"]
    return next((name for name in order if able[name]), "reference")


@pytest.mark.parametrize("measured", [None, "sdpa", "triton", "flash"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("versions", [(), (2,), (4,)])
def test_auto_on_every_call(versions, kernels, measured, monkeypatch):
    reason = None if kernels else "this GPU"
    monkeypatch.setattr("motif_kernels.machine.triton_unsupported_reason", lambda device: reason)
    monkeypatch.setattr(dispatch, "is_gpu", lambda device: True)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    table = {"up_to": None, "backend": measured}
    with installing(monkeypatch) as install, tuning.overriding(attention_backend=table) if measured else nullcontext():
        install(HOPPER, *versions)
        for call in itertools.product(dtypes, *[(False, True)] * 4):
            dtype, packed, window, training, noise = call
            q = torch.empty(*((8,) if packed else (1, 8)), 2, 64, dtype=dtype, requires_grad=training)
            inputs = AttentionInputs(q, q, *((q, q, q, torch.ones(())) if noise else (None, None, q, None)))
            bounds = torch.tensor([0, 8], dtype=torch.int32) if packed else None
            options = AttentionOptions.of(64, causal=True, window_size=(3, 0) if window else (-1, -1))
            taken = dispatch.choose("auto", inputs, Sequences(8, 8, bounds, bounds), options)
            assert taken == rule(versions != (), kernels, *call, measured), call


@pytest.mark.parametrize("capability", [BLACKWELL, (10, 3)], ids=["B200", "B300"])
@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (96, 192), (128, 128), (128, 256), (192, 128)])
def test_blackwell_takes_flash_attention_4(capability, widths, monkeypatch):
    """For every layout of the project, in training too; ours would be slower there."""
    monkeypatch.setattr("motif_kernels.machine.triton_unsupported_reason", lambda device: None)
    monkeypatch.setattr(dispatch, "is_gpu", lambda device: True)
    with installing(monkeypatch) as install:
        install(capability, 4)
        for packed, window, training in itertools.product((False, True), repeat=3):
            shape = (8,) if packed else (1, 8)
            q, v = (torch.empty(*shape, 4, w, dtype=torch.bfloat16, requires_grad=training) for w in widths)
            inputs = AttentionInputs(q, q, q, q, v, torch.ones(()), torch.ones(widths[1]))
            bounds = torch.tensor([0, 8], dtype=torch.int32) if packed else None
            options = AttentionOptions.of(widths[0], causal=True, window_size=(3, 0) if window else (-1, -1))
            assert dispatch.choose("auto", inputs, Sequences(8, 8, bounds, bounds), options) == "flash"
