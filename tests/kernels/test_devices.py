"""No public function reads a tensor that is elsewhere: mixed devices are refused by name, and all
tensors on the meta device give shapes.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import motif_kernels
from motif_kernels import machine

B, S, HS, HN, D, DV = 2, 5, 4, 2, 8, 16


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


_BATCH = tensors(q1=(B, S, HS, D), k1=(B, S, HN, D), q2=(B, S, HN, D), k2=(B, S, HN, D), v=(B, S, HN, DV))
_SOFTMAX = tensors(q=(B, S, HS, D), k=(B, S, HN, D), v=(B, S, HN, DV))
_LAM, _NORM, _GATE = {"lam": torch.rand(HS)}, {"norm_weight": torch.ones(DV)}, {"gate": torch.randn(B, S, HS, DV)}
_BOUNDS = {"cu_seqlens_q": lengths(0, 3, B * S), "cu_seqlens_k": lengths(0, 3, B * S)}
_LONGEST = {"max_seqlen_q": 7, "max_seqlen_k": 7}
_ROWS = {"places": torch.arange(B * S)[:, None], "offsets": lengths(3, B * S)}
_ROOM = {"cache_seqlens": lengths(3, 4), "cache_leftpad": lengths(0, 1)}


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.flatten(0, 1) for name, t in batch.items()}


def cached(batch: dict[str, Tensor], query: str) -> dict[str, Tensor]:
    return {(n if n.startswith("q") else f"{n}_cache"): t[:, :1] if n.startswith("q") else t for n, t in batch.items()}


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("diff_attn_func", _BATCH | _LAM | _NORM),
    "gated attention": ("diff_attn_func", _BATCH | _LAM | _GATE),
    "packed attention": ("diff_attn_varlen_func", packed(_BATCH) | _LAM | _NORM | _BOUNDS | _LONGEST),
    "decoding": ("diff_attn_with_kvcache", cached(_BATCH, "q1") | _LAM | _NORM | _ROOM),
    "decoding of new tokens": (
        "diff_attn_with_kvcache",
        cached(_BATCH, "q1") | _LAM | _ROOM | {n: _BATCH[n][:, :1] for n in ("k1", "k2", "v")},
    ),
    "softmax": ("softmax_attn_func", dict(_SOFTMAX)),
    "packed softmax": ("softmax_attn_varlen_func", packed(_SOFTMAX) | _BOUNDS | _LONGEST),
    "softmax decoding": ("softmax_attn_with_kvcache", cached(_SOFTMAX, "q") | _ROOM),
    "combine": ("diff_combine", tensors(o_signal=(B, S, HS, DV), o_noise=(B, S, HN, DV)) | _LAM | _NORM),
    "gated combine": ("diff_combine", tensors(o_signal=(B, S, HS, DV), o_noise=(B, S, HN, DV)) | _LAM | _GATE),
    "poly_norm": ("poly_norm", tensors(x=(B, S, D), weight=(3,), bias=(1,))),
    "mul_poly_norm": ("mul_poly_norm", tensors(gate=(B, S, D), up=(B, S, D), weight=(3,), bias=(1,))),
    "grouped_linear": ("grouped_linear", tensors(x=(B * S, D), weight=(HN, DV, D)) | {"offsets": lengths(3, B * S)}),
    "grouped_mul_poly_norm": (
        "grouped_mul_poly_norm",
        tensors(gate=(B * S, D), up=(B * S, D), weight=(HN, 3), bias=(HN, 1)) | {"offsets": lengths(3, B * S)},
    ),
    "select_experts": ("select_experts", tensors(logits=(B * S, HS), bias=(HS,)) | {"top_k": 2}),
    "expert_weights": (
        "expert_weights",
        tensors(logits=(B * S, HS)) | {"selected": torch.zeros(B * S, 1, dtype=torch.int64)},
    ),
    "sort_by_expert": ("sort_by_expert", {"selected": torch.zeros(B * S, 1, dtype=torch.int64), "num_experts": 2}),
    "dispatch_rows": ("dispatch_rows", tensors(x=(B * S, D)) | _ROWS),
    "combine_rows": ("combine_rows", tensors(rows=(B * S, D), weights=(B * S, 1)) | _ROWS),
    "read_streams": ("read_streams", tensors(streams=(B, S, 2, D), weight=(8, 2 * D), bias=(2,))),
    "stream_maps": ("stream_maps", tensors(products=(B, S, 8), bias=(6,))),
    "update_streams": (
        "update_streams",
        tensors(streams=(B, S, 2, D), out=(B, S, D), post=(B, S, 2), mix=(B, S, 2, 2)),
    ),
    "rms_norm": ("rms_norm", tensors(x=(B, S, D), weight=(D,))),
}


def call(name: str, arguments: dict[str, Any]) -> Tensor:
    """The first of its results."""
    function: Callable[..., Any] = getattr(motif_kernels, name)
    found = function(**arguments)
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def test_every_public_function_is_here() -> None:
    assert {name for name, _ in CALLS.values()} == set(motif_kernels.__all__)


@pytest.mark.parametrize("case", [c for c in CALLS if c != "sort_by_expert"])  # which has one tensor
def test_a_tensor_elsewhere_is_refused_by_name(case: str) -> None:
    name, arguments = CALLS[case]
    expected = call(name, arguments)
    assert torch.isfinite(expected).all()
    for argument, value in arguments.items():
        if isinstance(value, Tensor):
            with pytest.raises((ValueError, TypeError), match=r"on (meta|cpu).* on (meta|cpu)"):
                call(name, arguments | {argument: on_meta(value)})


@pytest.mark.parametrize("case", [c for c in CALLS if "decoding" not in c and "packed" not in c])
def test_all_on_the_meta_device_ask_for_shapes(case: str) -> None:
    name, arguments = CALLS[case]
    found = call(name, {n: on_meta(v) for n, v in arguments.items()})
    assert found.device.type == "meta"
    assert found.shape == call(name, arguments).shape


@pytest.mark.parametrize(("room", "launched"), [(3, [3]), (1, [3, 2, 1]), (0, [3, 2, 1])])
def test_a_gpu_with_less_room_gets_fewer_stages(room: int, launched: list[int]) -> None:
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    from triton.runtime.errors import OutOfResources

    from motif_kernels.impl.triton.launching import launch

    tried = []

    def run(*arguments: Any, num_stages: int, **options: Any) -> None:
        tried.append(num_stages)
        if num_stages > room:
            raise OutOfResources(num_stages, room, "shared memory")

    with contextlib.nullcontext() if room else pytest.raises(OutOfResources):
        launch({(1,): run}, (1,), num_stages=3)
    assert tried == launched


@pytest.mark.parametrize(("hip", "served"), [(None, True), ("6.4", False)])
def test_an_amd_gpu_is_no_hopper(hip: str | None, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx90a reports 9.0 as well; Hopper's tiles do not fit there."""
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI250X" if hip else "NVIDIA H100")
    assert (machine.triton_unsupported_reason(torch.device("cuda")) is None) == served
