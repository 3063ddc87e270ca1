"""PolyNorm on a feed-forward sharded over its width: real processes against the whole row."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.distributed import on_ranks
from helpers.interpreter import require_interpreter
from helpers.numerics import gradients, leaves
from motif_kernels import mul_poly_norm, poly_norm
from motif_kernels.ops import poly_norm as operators

SPLITS = {2: [40, 23], 3: [21, 21, 21]}
OPTIONS = {"sigmoid_weight": True, "out_scale": 0.5, "hidden_clamp": 1.5}


def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = torch.randn(3, 5, 63, generator=generator)
    return gate, up, grad, torch.tensor([0.2, -0.4, 0.5]), torch.tensor([0.3])


def on_one_rank(folder: Path, interpreted: bool) -> None:
    """Saves this rank's columns of results and gradients, and how many numbers it exchanged."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if interpreted:
        import motif_kernels.impl.triton.poly_norm as triton

        operators.implementation = lambda family, device: triton
    messages: list[int] = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, **options: (messages.append(tensor.numel()), all_reduce(tensor, **options))[1]
    gate, up, grad, weight, bias = tensors()
    columns = [t.split(SPLITS[world_size], dim=-1)[rank] for t in (gate, up)]
    inputs = leaves(*columns, weight, bias)
    grad = grad.split(SPLITS[world_size], dim=-1)[rank]
    group = dist.group.WORLD
    out = mul_poly_norm(*inputs, group=group, **OPTIONS)
    result = {"product": [out, *gradients(out, inputs, grad)]}
    without_up = [inputs[0], *inputs[2:]]
    out = poly_norm(*without_up, group=group)
    result["alone"] = [out, *gradients(out, without_up, grad)]
    compiled = torch.compile(lambda *t: poly_norm(*t, group=group), fullgraph=True, backend="aot_eager")
    out = compiled(*without_up)
    result["compiled"] = [out, *gradients(out, without_up, grad)]
    mesh = init_device_mesh("cpu", (world_size,))
    x, w, b = (
        DTensor.from_local(t, mesh, [placement], run_check=False).to_local()
        for t, placement in zip(without_up, (Shard(1), Replicate(), Replicate()), strict=True)
    )
    out = DTensor.from_local(poly_norm(x, w, b, group=mesh.get_group()), mesh, [Shard(1)], run_check=False).to_local()
    result["inside DTensors"] = [out, *gradients(out, without_up, grad)]
    torch.library.opcheck(
        operators.poly_norm_sharded, (*inputs, 1e-6, None, torch.float32, group.group_name), raise_exception=True
    )
    saved: dict[str, Any] = {k: [t.detach() for t in v] for k, v in result.items()}
    torch.save(saved | {"messages": messages[:4]}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "interpreted"), [(2, False), (3, False), (2, True)])
def test_shards_agree_with_whole_rows(ranks: int, interpreted: bool, tmp_path: Path) -> None:
    if interpreted:
        require_interpreter()
    gate, up, grad, weight, bias = tensors()
    expected = {}
    inputs = leaves(gate, up, weight, bias)
    out = mul_poly_norm(*inputs, **OPTIONS)
    expected["product"] = [out, *gradients(out, inputs, grad)]
    without_up = [inputs[0], *inputs[2:]]
    out = poly_norm(*without_up)
    expected["alone"] = expected["compiled"] = expected["inside DTensors"] = [out, *gradients(out, without_up, grad)]

    on_ranks(ranks, on_one_rank, tmp_path, interpreted)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name, whole in expected.items():
        for i, value in enumerate(whole):
            parts = [r[name][i] for r in results]
            if value.ndim == 1:  # weight and bias: the full gradient, the same on every rank
                for part in parts:
                    torch.testing.assert_close(part, value.detach(), atol=1e-5, rtol=1e-5)
                    assert torch.equal(part, parts[0])
            else:
                torch.testing.assert_close(torch.cat(parts, dim=-1), value.detach(), atol=2e-6, rtol=1e-5)
    # One message each way: three numbers a row, and the count of columns or the bias's gradient.
    for result in results:
        assert result["messages"] == [3 * 5 + 1] * 4


def test_nothing_is_copied_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy would wait for the device, and could not be captured in a CUDA graph."""
    rows, columns = 5, 8

    def numbers(count: int) -> torch.Tensor:
        return torch.empty(count, rows, device="meta")

    kernels = types.SimpleNamespace(
        power_sums=lambda x, **_: numbers(3),
        product_sums=lambda grad, x, up, **_: numbers(4),
        forward=lambda x, *_, **__: (torch.empty_like(x), None),
        backward=lambda grad, x, up, *_, **__: (torch.empty_like(x), torch.empty_like(up), None),
    )
    monkeypatch.setattr(operators, "implementation", lambda family, device: kernels)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    monkeypatch.setattr(dist.distributed_c10d, "_resolve_process_group", lambda name: None)
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            tensors = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if {t.device.type for t in tensors} == {"cpu", "meta"}:
                copied.append(function)
            return out

    def of_numbers(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("a tensor of the host's numbers")

    x, weight, bias = (torch.empty(shape, device="meta") for shape in ((rows, columns), 3, 1))
    # No mode sees the copy of a tensor that is made of a list.
    monkeypatch.setattr(torch.Tensor, "new_tensor", of_numbers)
    monkeypatch.setattr(torch, "tensor", of_numbers)
    monkeypatch.setattr(torch, "as_tensor", of_numbers)
    with Watch():
        _, inverse_rms, total = operators.forward_sharded(x, x, weight, bias, 1e-6, None, x.dtype, "")
        operators.backward_sharded(x, x, x, weight, bias, inverse_rms, total, None, "")
    assert not copied
