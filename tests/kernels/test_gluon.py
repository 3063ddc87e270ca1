"""Which calls the Gluon kernels serve; the kernels themselves are tested in ``ptx/``."""

from collections.abc import Callable
from importlib import metadata

import pytest
import torch
from torch import Tensor

from helpers.interpreter import require_interpreter
from motif_kernels import diff_attn_func
from motif_kernels.impl.gluon import availability
from motif_kernels.types import AttentionInputs


def call(d: int = 64, dv: int = 128, dtype: torch.dtype = torch.bfloat16) -> AttentionInputs:
    q, v = torch.zeros(1, 9, 2, d, dtype=dtype), torch.zeros(1, 9, 2, dv, dtype=dtype)
    return AttentionInputs(q, q.clone(), q.clone(), q.clone(), v, torch.tensor(0.3))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "runs_on", lambda device: True)
    monkeypatch.setattr(availability, "interface_is_present", lambda: True)


@pytest.mark.usefixtures("on_hopper")
def test_serves_what_they_are_written_for() -> None:
    assert availability.can_serve(call())
    assert availability.can_serve(call(128, 256, torch.float16))
    softmax = call()._replace(q2=None, k2=None, lam=None)
    assert availability.can_serve(softmax)


def unaligned(q: Tensor) -> Tensor:
    return torch.zeros(*q.shape[:-1], q.shape[-1] + 4, dtype=q.dtype)[..., 4:]


def expanded(q: Tensor) -> Tensor:
    return q[:, :, :1].expand_as(q)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("change", [unaligned, expanded])
@pytest.mark.parametrize("name", ["q1", "k1", "q2", "k2", "v"])
def test_leaves_tensors_that_tma_cannot_read_to_triton(name: str, change: Callable[[Tensor], Tensor]) -> None:
    inputs = call()
    assert not availability.can_serve(inputs._replace(**{name: change(getattr(inputs, name))}))


@pytest.mark.usefixtures("on_hopper")
def test_leaves_other_widths_and_precisions_to_triton() -> None:
    assert not availability.can_serve(call(dtype=torch.float32))
    assert not availability.can_serve(call(96, 192))


def test_leaves_other_devices_to_triton() -> None:
    assert not availability.can_serve(call())


def test_leaves_other_interfaces_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "3.9.0")
    availability.interface_is_present.cache_clear()
    assert not availability.interface_is_present()
    availability.interface_is_present.cache_clear()


def test_the_interpreter_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gluon has none: a call that Hopper would serve by it runs."""
    require_interpreter()
    monkeypatch.setattr(availability, "runs_on", lambda device: True)
    inputs = call(dtype=torch.float16)
    assert (diff_attn_func(*inputs[:6], backend="triton") == 0).all()
