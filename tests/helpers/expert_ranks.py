"""Experts that ranks share, against one process: functions that ranks run."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from helpers import deep_ep_stand_in
from helpers.agreement import randomise
from helpers.layouts import Case, build, train_cases
from motifarch.data import BatchLoader, BatchSchedule, Mixture, MixtureComponent, PackedDataset
from motifarch.errors import UserError
from motifarch.layers import MixtureOfExperts, token_exchange
from motifarch.layers.deep_ep_exchange import DeepEPExchange
from motifarch.parallel import Mesh, World, expert, fsdp, open_world
from motifarch.shards import local_shard, to_local
from motifarch.train.step import count_targets, train_step

EXPERTS, TOP_K, SIZE, TOKENS = 8, 2, 6, 12
MANY = 1e3
"""A selection bias that no score outweighs."""

# A bias on the selection for each expert, and which ranks' tokens are padding.
LOADS: dict[str, tuple[list[float], list[int]]] = {
    "uneven": ([0.3, -0.2, 0.1, -0.4, 0.0, 0.2, -0.1, 0.1], []),
    "one expert gets nothing": ([0, -MANY, 0, 0, 0, 0, 0, 0], []),
    "one expert gets every token": ([0, 0, 0, 0, 0, 0, 0, MANY], []),
    "one rank gets everything": ([MANY, MANY, 0, 0, 0, 0, 0, 0], []),
    "one rank sends nothing": ([0.0] * EXPERTS, [1]),
    "nobody sends anything": ([0.0] * EXPERTS, [0, 1, 2, 3]),
}


def layer(bias: list[float], shared: int, dtype: torch.dtype = torch.float64) -> MixtureOfExperts:
    torch.manual_seed(1)
    options: dict[str, Any] = {"num_experts": EXPERTS, "intermediate_size": 5, "num_shared_experts": shared}
    block = MixtureOfExperts(SIZE, top_k=TOP_K, dtype=dtype, balance_loss_coeff=0.1, **options)
    randomise(block, std=0.5)
    block.expert_bias.copy_(torch.tensor(bias))
    block.record_expert_outputs = True
    return block


def compare_layers() -> None:
    """Outputs, losses, gradients and statistics under every load, with and without a shared one."""
    with open_world() as world:
        mesh = init_device_mesh("cpu", (world.size,))
        for name, (bias, padded) in LOADS.items():
            for shared in (0, 1):
                compare_layer(world, mesh, name, layer(bias, shared), layer(bias, shared), padded)


def order_of_work() -> None:
    """The shared expert's work lies between a message's start and its end, forward and backward."""
    with open_world() as world, pytest.MonkeyPatch.context() as patch:
        block = layer([0.0] * EXPERTS, 1)
        expert.deal_out(block, init_device_mesh("cpu", (world.size,)))
        done: list[str] = []

        def noted(function: Callable[..., torch.Tensor], name: str) -> Callable[..., torch.Tensor]:
            def note(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
                if x.is_floating_point():
                    done.append(name)
                return function(x, *arguments)

            return note

        for function, name in (("_all_to_all", "start"), ("_wait", "end")):
            patch.setattr(token_exchange, function, noted(getattr(token_exchange, function), name))
        for module in (block.experts, block.shared_experts):
            assert module is not None
            name = "experts" if module is block.experts else "shared"
            module.register_forward_hook(lambda *_, name=name: done.append(name))
            module.register_full_backward_hook(lambda *_, name=name: done.append(name))
        x = torch.randn(1, TOKENS, SIZE, dtype=torch.float64, requires_grad=True)
        out = block(x).hidden_states
        assert done == ["start", "shared", "end", "experts", "start", "end"], done
        done.clear()
        out.sum().backward()
        assert done == ["start", "end", "experts", "start", "shared", "end"], done


def compare_deep_ep() -> None:
    """The same with a stand-in for DeepEP, whose weights are float32."""
    with open_world() as world, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", deep_ep_stand_in)
        mesh = init_device_mesh("cpu", (world.size,))
        for name, (bias, padded) in LOADS.items():
            block = layer(bias, 1, torch.float32)
            block.exchange = DeepEPExchange
            compare_layer(world, mesh, name, layer(bias, 1, torch.float32), block, padded)


def choose_exchanges() -> None:
    """What serves where DeepEP is on all ranks, on none, on one, or broken."""
    with open_world() as world:
        group, half = dist.group.WORLD, torch.bfloat16
        assert group is not None
        for ranks, serves in (({0, 1}, DeepEPExchange), (set[int](), token_exchange.TokenExchange)):
            with _deep_ep_on(world.rank in ranks):
                assert expert.choose_exchange("cuda", half, group) is serves
                assert expert.choose_exchange("cuda", torch.float32, group) is token_exchange.TokenExchange
                assert expert.choose_exchange("cpu", half, group) is token_exchange.TokenExchange
        with _deep_ep_on(world.rank == 0), pytest.raises(UserError, match="not on those of ranks 1;"):
            expert.choose_exchange("cuda", half, group)
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            Path(folder, "deep_ep.py").write_text("import libraries_that_nobody_has\n")
            patch.syspath_prepend(folder)
            with pytest.raises(ImportError, match="libraries_that_nobody_has"):
                expert.choose_exchange("cuda", half, group)


@contextmanager
def _deep_ep_on(here: bool) -> Iterator[None]:
    """As if it were installed here, or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", deep_ep_stand_in if here else None)
        yield


def compare_layer(
    world: World, mesh: Any, name: str, whole: MixtureOfExperts, block: MixtureOfExperts, padded: list[int]
) -> None:
    expert.deal_out(block, mesh)
    torch.manual_seed(2)
    dtype = whole.router.gate.weight.dtype
    x, grad = (torch.randn(world.size, TOKENS, SIZE, dtype=dtype) for _ in range(2))
    real = torch.ones(world.size, TOKENS, dtype=torch.bool)
    real[[rank for rank in padded if rank < world.size]] = False
    own = x[world.rank : world.rank + 1].clone().requires_grad_()
    all_ = x.clone().requires_grad_()
    out = block(own, padding=real[world.rank : world.rank + 1])
    expected = whole(all_, padding=real)
    mine = slice(world.rank, world.rank + 1)

    def same(found: torch.Tensor, truth: torch.Tensor, what: str) -> None:
        exact = found.dtype == torch.float64
        tolerance = {"rtol": 0 if exact else 1e-5, "atol": 1e-10 if exact else 1e-5}
        torch.testing.assert_close(found, truth, **tolerance, msg=lambda m: f"{name}, {what}: {m}")

    same(out.hidden_states, expected.hidden_states[mine], "outputs")
    same(out.losses, expected.losses[mine], "losses")
    ((out.hidden_states * grad[mine]).sum() + out.losses.sum()).backward()
    ((expected.hidden_states * grad).sum() + expected.losses.sum()).backward()
    assert own.grad is not None
    assert all_.grad is not None
    same(own.grad, all_.grad[mine], "gradient of the tokens")
    for (path, found), truth in zip(block.named_parameters(), whole.parameters(), strict=True):
        assert found.grad is not None, f"{name}: no gradient of {path}"
        assert truth.grad is not None
        gradient = to_local(found.grad)
        if not path.startswith("experts."):
            dist.all_reduce(gradient)
        same(gradient, local_shard(truth.grad, found), path)
    for buffer in ("tokens_per_expert", "statistic_sums", "expert_output_sums", "output_peak_sums"):
        total = block.get_buffer(buffer).clone()
        dist.all_reduce(total)
        same(total, whole.get_buffer(buffer), buffer)


@contextmanager
def without(left_out: str) -> Iterator[None]:
    """Trains with one thing that expert parallelism needs left out."""
    with pytest.MonkeyPatch.context() as patch:
        LEFT_OUT[left_out](patch)
        yield


def _no_counts(patch: pytest.MonkeyPatch) -> None:
    """Ranks know how many rows arrive, but not for which experts."""
    exchange = token_exchange.exchange_counts

    def guess(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        arriving = exchange(counts, group)
        first = torch.zeros_like(arriving)
        first[:, 0] = arriving.sum(dim=1)
        return first

    patch.setattr(token_exchange, "exchange_counts", guess)


def _no_message(backward: bool, place: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Rows stay away: of each layer's two messages in a direction, that of a place."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        send, calls = token_exchange._all_to_all, [0, 0]

        def silent(x: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> torch.Tensor:
            if not x.is_floating_point():
                return send(x, received, sent, group)
            in_backward = torch._C._current_graph_task_id() != -1
            calls[in_backward] += 1
            if in_backward == backward and (calls[in_backward] - 1) % 2 == place:
                return x.new_zeros(sum(received), *x.shape[1:])
            return send(x, received, sent, group)

        patch.setattr(token_exchange, "_all_to_all", silent)

    return leave_out


def _no_all_reduce(patch: pytest.MonkeyPatch) -> None:
    """The copies of HSDP keep gradients of experts to themselves."""
    all_reduce, groups = dist.all_reduce, []
    shard = fsdp.apply_fsdp

    def noted(model: nn.Module, mesh: Mesh, *arguments: Any) -> None:
        shard(model, mesh, *arguments)
        groups.append(mesh.expert_parameters["replicate"].get_group())
        assert mesh.parameters["replicate"].get_group() not in groups

    def without_experts(*arguments: Any, **options: Any) -> Any:
        return None if options.get("group") in groups else all_reduce(*arguments, **options)

    patch.setattr(sys.modules["motifarch.parallel.parallelize"], "apply_fsdp", noted)
    patch.setattr(dist, "all_reduce", without_experts)


def _on_experts(change: Callable[[FSDPModule], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Something else is done to the experts' FSDP modules."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        shard = fsdp.apply_fsdp

        def changed(model: nn.Module, *arguments: Any) -> None:
            shard(model, *arguments)
            for block in (m for m in model.modules() if isinstance(m, MixtureOfExperts)):
                assert isinstance(block.experts, FSDPModule)
                change(block.experts)

        # The package has a function of the module's name.
        patch.setattr(sys.modules["motifarch.parallel.parallelize"], "apply_fsdp", changed)

    return leave_out


class _OwnPart:
    """In the place of a reduce-scatter: what this rank has of its part."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, **_: Any) -> None:
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


LEFT_OUT: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "counts": _no_counts,
    "dispatch": _no_message(backward=False, place=0),
    "combine": _no_message(backward=False, place=1),
    "gradient of combine": _no_message(backward=True, place=0),
    "gradient of dispatch": _no_message(backward=True, place=1),
    "division by all ranks": _on_experts(lambda experts: experts.set_gradient_divide_factor(1.0)),
    "reduction over shards": _on_experts(lambda experts: experts.set_custom_reduce_scatter(_OwnPart())),  # type: ignore[arg-type]
    "reduction over copies": _no_all_reduce,
}


def train_without(data: Path, output: Path, cases: dict[str, Case]) -> None:
    """Trains each case without what names it, or whole where that is nothing to leave out."""
    for name, case in cases.items():
        with without(name) if name in LEFT_OUT else nullcontext():
            train_cases(data, output.with_name(f"{name}.pt"), [case])


def skip_a_step(data: Path, case: Case) -> None:
    """A router that is NaN on one rank alone: no rank takes the step, all take the next one."""
    with open_world() as world:
        mesh = Mesh("cpu", case.layout.resolve(world.size))
        dataset = PackedDataset.open(data)
        state = build(case, mesh, dataset.seq_len)
        mixture = Mixture([MixtureComponent(dataset)], seed=0, batch_schedule=BatchSchedule(8))
        place = {"rank": mesh.data_rank, "world_size": world.size, "micro_batch_size": 2}
        loader = BatchLoader(mixture, **place, start_step=0, stop_step=3)
        options: dict[str, Any] = {"lr": 1e-3, "clip": 1.0, "expert_bias_rate": 0.01, "layout": mesh.layout}
        gate = next(m for m in state.model.modules() if isinstance(m, MixtureOfExperts)).router.gate
        for step, batches in loader:
            broken = step == 1 and world.rank == world.size - 1
            hook = gate.register_forward_hook(lambda *inputs: inputs[-1] * torch.nan) if broken else None
            before = {n: to_local(t).clone() for n, t in state.model.state_dict().items()}
            (targets,) = world.all_reduce_sum([count_targets(batches)])
            result = train_step(state, batches, world=world, targets=targets, **options)
            moved = [n for n, t in state.model.state_dict().items() if not torch.equal(to_local(t), before[n])]
            assert result.skipped.item() == (step == 1)
            assert bool(moved) == (step != 1), moved
            if hook is not None:
                hook.remove()
