"""What Muon sends: Parallel Muon and torch.optim.Muon on one model, cut by FSDP2 over processes.

    python -m benchmarks.communication.muon              # four gloo processes, about a minute
    python -m benchmarks.communication.muon --quick      # two processes and a tiny model

Counts are exact and the same on any machine; nothing is timed. One step of each optimizer is
watched below DTensor: every collective, and the bytes that it brings to each rank from other ranks,
added up over the ranks. The least that a step can bring is each matrix's foreign part to one owner,
and the update's part back to those who hold it.

torch.optim.Muon does its arithmetic on DTensors: each product of a Newton-Schulz step gathers or
sums what it needs. Where DTensor exchanges rows for columns it gathers everything on gloo; what is
counted is the all-to-all of a GPU. Both compute in bfloat16 with Keller Jordan's coefficients, the
only ones that torch's takes.
"""

import argparse
import dataclasses
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch.distributed.tensor import DTensor, distribute_tensor, placement_types
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib import cli, report
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.optim import NS_COEFFICIENTS, Muon
from motifarch.optim.build import hidden_matrices
from motifarch.parallel import Layout, Mesh, open_world, parallelize

MEBIBYTE = 1 << 20
OPTIMIZERS = {"parallel": "Parallel Muon", "torch": "torch.optim.Muon"}
# The operators by which the two optimizers send -> kind of collective.
_OPERATORS = {
    "c10d::alltoall_base_": "all_to_all",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
}
KINDS = tuple(_OPERATORS.values())
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
        heads: dict[str, Any] = {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4}
        sizes: dict[str, Any] = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        sizes |= {"num_hidden_layers": self.layers, "head_dim": self.hidden_size // 8, "vocab_size": 64}
        return MotifForCausalLM(MotifConfig(**heads, **sizes))

    def optimizer(self, name: str, matrices: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """One of :data:`OPTIMIZERS`."""
        steps = NS_COEFFICIENTS["keller_jordan"]
        if name == "torch":
            return torch.optim.Muon(matrices, lr=1e-2, ns_coefficients=steps[0], adjust_lr_fn="match_rms_adamw")
        return Muon(matrices, lr=1e-2, ns_coefficients=steps, chunk_bytes=self.chunk_mib * MEBIBYTE)


class CollectiveCounter(TorchDispatchMode):
    """Notes every collective of a process: its kind, and the bytes that come from other ranks.

    One is for good: an exchange of rows for columns, which on gloo gathers by collectives that
    cannot be told from others, is counted in DTensor's stead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.messages: list[tuple[str, float]] = []
        exchange = placement_types.shard_dim_alltoall

        def count(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
            ranks = dist.get_world_size()
            self.messages.append(("all_to_all", tensor.nbytes * (ranks - 1) / ranks))
            self.paused = True
            try:
                return exchange(tensor, *args)
            finally:
                self.paused = False

        placement_types.shard_dim_alltoall = count

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count a collective and let it run; DTensor's operators are taken apart first."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result, name = function(*args, **(kwargs or {})), function._schema.name
        if not self.paused and name in _OPERATORS:
            self.messages.append((_OPERATORS[name], _received(name, args)))
        elif not self.paused and function.namespace in ("c10d", "_c10d_functional", "_dtensor") and name not in _SILENT:
            raise UserError(f"the bytes of {name} are not known to this benchmark; add it to its list")
        return result


def _received(name: str, args: tuple[Any, ...]) -> float:
    """Bytes that a collective brings to this rank; sums as a ring of ranks does them."""
    ranks, size = dist.get_world_size(), args[0].nbytes
    if name == "c10d::alltoall_base_":  # arguments: output, input, group, sizes received, sizes sent
        return float((sum(args[3]) - args[3][dist.get_rank()]) * args[0].itemsize)
    if name == "_c10d_functional::all_gather_into_tensor":  # the argument is this rank's part
        return float(size * (ranks - 1))
    return float(size * (ranks - 1) / ranks * (2 if name == "_c10d_functional::all_reduce" else 1))


def _measure(rank: int, setup: Setup, port: int, path: Path) -> None:
    """One process: a step of each optimizer from the same weights with the same gradients."""
    torch.set_num_threads(1)
    # It warns of the gathering in an all-to-all's place, which is counted as what it stands for.
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setup.processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    counter = CollectiveCounter()
    found: dict[str, Any] = {}
    with open_world() as world:
        weights: dict[str, list[torch.Tensor]] = {}
        for name in OPTIMIZERS:
            model = parallelize(setup.model(), Mesh("cpu", Layout().resolve(world.size)))
            matrices = hidden_matrices(model)
            optimizer = setup.optimizer(name, matrices)
            for _ in range(2):  # the first step may open process groups
                torch.manual_seed(1)
                for matrix in matrices:
                    assert isinstance(matrix, DTensor)
                    gradient = torch.randn(matrix.shape)
                    matrix.grad = distribute_tensor(gradient, matrix.device_mesh, matrix.placements)  # type: ignore[assignment]
                counter.messages.clear()
                with counter:
                    optimizer.step()
            weights[name] = [m.full_tensor().detach() for m in matrices if isinstance(m, DTensor)]
            total = world.all_reduce_sum([round(sum(b for k, b in counter.messages if k == kind)) for kind in KINDS])
            found[name] = {
                "collectives": {kind: sum(k == kind for k, _ in counter.messages) for kind in KINDS},
                "bytes": dict(zip(KINDS, total, strict=True)),
            }
        # Each chunk goes to its owners and comes back.
        found["parallel"]["chunks"] = found["parallel"]["collectives"]["all_to_all"] // 2
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


def measure(setup: Setup) -> dict[str, Any]:
    """Start the processes; what they counted."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.pt"
        mp.spawn(_measure, args=(setup, port, path), nprocs=setup.processes)
        return dict(torch.load(path))


def print_table(content: dict[str, Any], console: Console) -> None:
    """Collectives and bytes of each optimizer's step."""
    setup, rows = content["setup"], []
    for name, label in OPTIMIZERS.items():
        calls, sent = content["results"][name]["collectives"], sum(content["results"][name]["bytes"].values())
        ratios = (f"{sum(calls.values()) / content['matrices']:.2f}", f"{sent / content['least_bytes']:.2f}")
        rows.append([label, *(str(calls[kind]) for kind in KINDS), f"{sent / MEBIBYTE:,.1f}", *ratios])
    title = (
        f"One step on {content['matrices']} matrices, {content['numbers'] / 1e6:.1f} million numbers, "
        f"FSDP2 on {setup['processes']} processes"
    )
    kinds = [kind.replace("_", "-\n", 1).replace("_", "-") for kind in KINDS]
    console.print(report.table(title, ["", *kinds, "MiB", "calls a\nmatrix", "of the\nleast MiB"], rows))
    console.print(
        f"Chunks of at most {setup['chunk_mib']} MiB a rank: {content['results']['parallel']['chunks']}. "
        f"Weights after two steps differ by at most {content['largest_difference_of_weights']:.1e}."
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Count and report.

    Raises:
        UserError: an option has no meaning.
    """
    for name in ("processes", "chunk_mib"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    setup = Setup(arguments.processes, 512, 2048, 4, arguments.chunk_mib)
    if arguments.quick:
        setup = Setup(2, 64, 128, 2, arguments.chunk_mib)
    environment = report.environment("benchmarks.communication.muon", torch.device("cpu"), ["torch", "motifarch"])
    content = {"benchmark": "muon_communication", "environment": environment, **measure(setup)}
    print_table(content, console)
    report.write_json(arguments.output, content)
    console.print(f"figures: {arguments.output}", soft_wrap=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.bare_parser("benchmarks.communication.muon", __doc__)
    add = parser.add_argument
    add("--processes", type=int, default=4, help="gloo processes; default: %(default)s")
    add("--chunk-mib", type=int, default=1, help="whole matrices a rank gathers at once; default: %(default)s")
    add("--quick", action="store_true", help="two processes and a tiny model")
    add("--output", type=Path, default=report.RESULTS / "muon_communication_cpu.json", help="JSON file")
    return cli.exit_status(lambda: run(parser.parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
