"""What Muon sends: Parallel Muon and torch.optim.Muon on the same model, cut by FSDP2 over real
processes.

    python -m benchmarks.muon_communication              # four gloo processes, about a minute on two cores
    python -m benchmarks.muon_communication --quick      # two processes and a tiny model

Counts are exact and the same on any machine; nothing is timed. One step of each optimizer is
watched below DTensor: every collective, and the bytes that it brings to each rank from other ranks,
added up over the ranks. The least that a step can bring is each matrix's foreign part to one owner,
and the update's part back to those who hold it.

torch.optim.Muon does its arithmetic on DTensors: each product of a Newton-Schulz step gathers or
sums what it needs. Where DTensor exchanges rows for columns it gathers everything on gloo; what is
counted is the all-to-all of a GPU. Both compute in bfloat16 with Keller Jordan's coefficients, the
only ones that torch's takes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch.distributed.tensor import DTensor, distribute_tensor, placement_types
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib import report
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.optim import NS_COEFFICIENTS, Muon
from motifarch.optim.build import hidden_matrices
from motifarch.parallel import Layout, Mesh, open_world, parallelize

MEBIBYTE = 1 << 20
OPTIMIZERS = {"parallel": "Parallel Muon", "torch": "torch.optim.Muon"}
KINDS = {
    "all_to_all": "all-to-all",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_reduce": "all-reduce",
}
# The operators by which the two optimizers send.
_OPERATORS = {
    "c10d::alltoall_base_": "all_to_all",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
}
_SILENT = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained, on how many processes; picklable."""

    processes: int
    hidden_size: int
    intermediate_size: int
    layers: int
    chunk_mib: int

    def model(self) -> MotifForCausalLM:
        """Grouped differential attention 4:1 with PolyNorm, from a fixed seed."""
        torch.manual_seed(0)
        return MotifForCausalLM(
            MotifConfig(
                vocab_size=64,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.layers,
                num_attention_heads=10,
                num_noise_heads=2,
                num_key_value_heads=4,
                head_dim=self.hidden_size // 8,
            )
        )


class CollectiveCounter(TorchDispatchMode):
    """Notes every collective that this process takes part in: its kind, and the bytes that come
    from other ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.messages: list[tuple[str, float]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Counts a collective and lets it run; DTensor's operators are asked for what they consist
        of.
        """
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        if self.paused:
            return result
        name = function._schema.name
        if name in _OPERATORS:
            self.messages.append((_OPERATORS[name], _received(name, args)))
        elif function.namespace in ("c10d", "_c10d_functional", "_dtensor") and name not in _SILENT:
            raise UserError(f"the bytes of {name} are not known to this benchmark; add it to its list")
        return result

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is sent in this context."""
        exchange: Callable[..., torch.Tensor] = placement_types.shard_dim_alltoall

        def count(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
            ranks = dist.get_world_size()
            self.messages.append(("all_to_all", tensor.numel() * tensor.itemsize * (ranks - 1) / ranks))
            self.paused = True
            try:
                return exchange(tensor, *args)
            finally:
                self.paused = False

        with mock.patch.object(placement_types, "shard_dim_alltoall", count), self:
            yield


def _received(name: str, args: tuple[Any, ...]) -> float:
    """Bytes that a collective of all ranks brings to this one from others; sums as a ring of ranks
    does them.
    """
    ranks, size = dist.get_world_size(), args[0].numel() * args[0].itemsize
    share = size * (ranks - 1) / ranks
    if name == "c10d::alltoall_base_":  # arguments: output, input, group, sizes received, sizes sent
        return float((sum(args[3]) - args[3][dist.get_rank()]) * args[0].itemsize)
    if name == "_c10d_functional::all_gather_into_tensor":  # the argument is this rank's part
        return float(size * (ranks - 1))
    return 2 * share if name == "_c10d_functional::all_reduce" else share


def _measure(rank: int, setup: Setup, port: int, path: Path) -> None:
    """One process: a step of each optimizer from the same weights with the same gradients."""
    torch.set_num_threads(1)
    # It warns of the gathering in an all-to-all's place, which is counted as what it stands for.
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setup.processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with open_world() as world:
        found: dict[str, Any] = {}
        weights: dict[str, list[torch.Tensor]] = {}
        for name in OPTIMIZERS:
            model = parallelize(setup.model(), Mesh("cpu", Layout().resolve(world.size)))
            matrices = hidden_matrices(model)
            optimizer = _optimizer(name, matrices, setup)
            for _ in range(2):  # the first step may open process groups
                torch.manual_seed(1)
                for matrix in matrices:
                    assert isinstance(matrix, DTensor)
                    gradient = torch.randn(matrix.shape)
                    matrix.grad = distribute_tensor(gradient, matrix.device_mesh, matrix.placements)  # type: ignore[assignment]
                counter = CollectiveCounter()
                with counter.counting():
                    optimizer.step()
            weights[name] = [m.full_tensor().detach() for m in matrices if isinstance(m, DTensor)]
            received = {kind: sum(b for k, b in counter.messages if k == kind) for kind in KINDS}
            total = world.all_reduce_sum([round(b) for b in received.values()])
            found[name] = {
                "collectives": {kind: sum(k == kind for k, _ in counter.messages) for kind in KINDS},
                "bytes": dict(zip(KINDS, total, strict=True)),
            }
            if name == "parallel":
                families = [family for found in optimizer._families.values() for _, family in found]  # type: ignore[attr-defined]
                found[name]["chunks"] = sum(len(family.chunks) for family in families)
        difference = max(float((a - b).abs().max()) for a, b in zip(*weights.values(), strict=True))
        numbers = sum(m.numel() for m in matrices)
        if world.is_main:
            content = {
                "setup": dataclasses.asdict(setup),
                "matrices": len(matrices),
                "numbers": numbers,
                # A rank lacks (n - 1) / n of what it owns, and of its parts' updates others own as
                # much.
                "least_bytes": round(2 * numbers * 2 * (world.size - 1) / world.size),
                "largest_difference_of_weights": difference,
                "results": found,
            }
            torch.save(content, path)


def _optimizer(name: str, matrices: list[torch.nn.Parameter], setup: Setup) -> torch.optim.Optimizer:
    if name == "torch":
        triple = NS_COEFFICIENTS["keller_jordan"][0]
        return torch.optim.Muon(matrices, lr=1e-2, ns_coefficients=triple, adjust_lr_fn="match_rms_adamw")
    return Muon(
        matrices, lr=1e-2, ns_coefficients=NS_COEFFICIENTS["keller_jordan"], chunk_bytes=setup.chunk_mib * MEBIBYTE
    )


def measure(setup: Setup) -> dict[str, Any]:
    """Starts the processes and returns what they counted."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.pt"
        mp.spawn(_measure, args=(setup, port, path), nprocs=setup.processes)
        return dict(torch.load(path))


def print_table(content: dict[str, Any], console: Console) -> None:
    """Collectives and bytes of each optimizer's step."""
    rows = []
    for name, label in OPTIMIZERS.items():
        result = content["results"][name]
        calls, sent = sum(result["collectives"].values()), sum(result["bytes"].values())
        kinds = [str(result["collectives"][kind]) for kind in KINDS]
        per_matrix = f"{calls / content['matrices']:.2f}"
        least = f"{sent / content['least_bytes']:.2f}"
        rows.append([label, *kinds, per_matrix, f"{sent / MEBIBYTE:,.1f}", least])
    setup = content["setup"]
    title = (
        f"One step on {content['matrices']} matrices, {content['numbers'] / 1e6:.1f} million numbers, "
        f"FSDP2 on {setup['processes']} processes"
    )
    kinds = [label.replace("-", "-\n", 1) for label in KINDS.values()]
    headings = ["", *kinds, "for a\nmatrix", "MiB\n", "times\nleast"]
    console.print(report.table(title, headings, rows))
    chunks = content["results"]["parallel"]["chunks"]
    console.print(
        f"Parallel Muon: {chunks} chunk{'s' if chunks > 1 else ''} of at most {setup['chunk_mib']} MiB a rank. "
        f"Weights after two steps differ by at most {content['largest_difference_of_weights']:.1e}."
    )


def draw(content: dict[str, Any], path: Path) -> None:
    """Collectives and MiB by kind, as bars."""
    figure, axes = report.figure(1, 2, size=(11, 4))
    colours = {OPTIMIZERS["parallel"]: report.COLOURS[0], OPTIMIZERS["torch"]: report.GREY}
    kinds = [k for k in KINDS if any(r["collectives"][k] for r in content["results"].values())]
    groups = [*(KINDS[k] for k in kinds), "all"]
    for axis, field, unit, title in zip(
        axes[0], ("collectives", "bytes"), (1, MEBIBYTE), ("collectives", "MiB from other ranks"), strict=True
    ):
        series = {}
        for name, label in OPTIMIZERS.items():
            values = content["results"][name][field]
            series[label] = [value / unit for value in (*(values[k] for k in kinds), sum(values.values()))]
        report.grouped_bars(axis, groups, series, colours=colours, label="{:,.0f}".format)
        axis.set_title(f"{title}, one step", fontsize=10)
    axes[0][1].axhline(content["least_bytes"] / MEBIBYTE, color="#555555", linewidth=0.8, linestyle="--", zorder=0)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), frameon=False)
    setup = content["setup"]
    figure.suptitle(
        f"Muon on {content['matrices']} matrices ({content['numbers'] / 1e6:.1f} million numbers), FSDP2 on "
        f"{setup['processes']} processes; dashed: each matrix once there and back\n"
        f"{report.describe(content['environment'])}",
        fontsize=9,
    )
    report.write_plot(path, figure)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.muon_communication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=4, help="gloo processes; default: 4")
    parser.add_argument("--chunk-mib", type=int, default=1, help="whole matrices a rank gathers at once; default: 1")
    parser.add_argument("--quick", action="store_true", help="two processes and a tiny model")
    default = report.RESULTS / "muon_communication_cpu.json"
    parser.add_argument(
        "--output",
        type=Path,
        default=default,
        help="JSON file, a picture beside it; default benchmarks/results/muon_communication_cpu.json",
    )
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        for name in ("processes", "chunk_mib"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
        setup = Setup(arguments.processes, 512, 2048, 4, arguments.chunk_mib)
        if arguments.quick:
            setup = Setup(2, 64, 128, 2, arguments.chunk_mib)
        environment = report.environment("benchmarks.muon_communication", torch.device("cpu"), ["torch", "motifarch"])
        with console.status(f"two steps of each optimizer on {setup.processes} processes"):
            content = {"benchmark": "muon_communication", "environment": environment, **measure(setup)}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(content, console)
    path = arguments.output
    report.write_json(path, content)
    draw(content, path.with_suffix(".png"))
    console.print(f"{path} and {path.with_suffix('.png').name}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
