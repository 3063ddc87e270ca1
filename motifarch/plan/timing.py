"""How long a step takes, from what a rank computes, moves and sends, under stated assumptions."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from motifarch.hardware import Gpu
from motifarch.plan.communication import Traffic
from motifarch.plan.dry_run import StepTrace
from motifarch.plan.flops import ATTENTION, MATRICES
from motifarch.typed_yaml import Section, TypedYaml

Efficiency = Annotated[float, Field(ge=1e-6, le=1)]


@dataclass(frozen=True)
class Assumptions(Section):
    """What a plan takes for granted. None of it was measured on the GPU that is planned for."""

    matmul_efficiency: Efficiency = 0.7
    """Part of the peak that products with weights reach."""

    attention_efficiency: Efficiency = 0.35
    """Part of the peak that attention reaches, by the FLOPs of its mathematics: what the
    deterministic backward multiplies twice is a part of it.
    """

    memory_efficiency: Efficiency = 0.8
    """Part of the memory bandwidth that norms, rotations, casts and the optimizer reach."""

    link_efficiency: Efficiency = 0.8
    """Part of NVLink's and the network's bandwidth that large collectives reach."""

    overlap: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Part of the computing time that FSDP's, HSDP's and Muon's messages can hide behind."""

    fusion: Annotated[float, Field(ge=1, le=100)] = 3.0
    """With `compile`: how many times fewer bytes the decoder layers' element-wise operators move.
    """

    reserve: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Part of the memory left to the CUDA context, NCCL's buffers and the allocator's fragments."""


ASSUMPTIONS = TypedYaml(Assumptions, "assumption")


@dataclass(frozen=True)
class StepTime:
    """Where a step's seconds go; they add up to `total`."""

    matrices: float
    attention: float
    elementwise: float
    optimizer: float
    waiting: float
    """For tensor-parallel and Ulysses messages, which computation needs at once."""
    exposed: float
    """For FSDP's, HSDP's and Muon's, as far as computation can't hide them."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.matrices + self.attention + self.elementwise + self.optimizer + self.waiting + self.exposed


def step_time(trace: StepTrace, gpu: Gpu, assumed: Assumptions, *, compiled: bool) -> StepTime:
    """Estimates the time of a step, whose decoder layers are compiled or not.

    Latencies are left out, so a step of many small messages takes longer.
    """

    def work(part: str, optimizer: bool) -> float:
        return sum(n for (phase, p), n in trace.flops.items() if p == part and (phase == "optimizer") == optimizer)

    def sent(traffic: Traffic) -> float:
        bandwidth = gpu.nvlink if traffic.link == "NVLink" else gpu.network
        return traffic.sent / (bandwidth * assumed.link_efficiency)

    matmul, bandwidth = gpu.bf16_flops * assumed.matmul_efficiency, gpu.memory_bandwidth * assumed.memory_efficiency
    moved = sum(
        n / (assumed.fusion if compiled and phase in ("forward", "recompute", "backward") else 1.0)
        for phase, n in trace.moved.items()
        if phase != "optimizer"
    )
    matrices = work(MATRICES, False) / matmul
    attention = work(ATTENTION, False) / (gpu.bf16_flops * assumed.attention_efficiency)
    optimizer = work(MATRICES, True) / matmul + trace.moved.get("optimizer", 0.0) / bandwidth
    optimizer += 2 * trace.offloaded / (gpu.host * assumed.link_efficiency)  # there and back
    computing = matrices + attention + moved / bandwidth
    muon = sum(sent(t) for t in trace.traffic if t.name == "Muon")
    others = sum(sent(t) for t in trace.traffic if not t.blocking and t.name != "Muon")
    return StepTime(
        matrices=matrices,
        attention=attention,
        elementwise=moved / bandwidth,
        optimizer=optimizer,
        waiting=sum(sent(t) for t in trace.traffic if t.blocking),
        exposed=max(0.0, others - assumed.overlap * computing) + max(0.0, muon - assumed.overlap * optimizer),
    )
