"""How long a step takes, from what a rank computes, moves and sends, under stated assumptions."""

from dataclasses import dataclass

from motifarch.hardware import Gpu
from motifarch.plan.assumptions import Assumptions
from motifarch.plan.communication import Traffic
from motifarch.plan.dry_run import StepTrace
from motifarch.plan.flops import ATTENTION, EXPERTS, MATRICES


@dataclass(frozen=True)
class StepTime:
    """Where a step's seconds go; they add up to `total`."""

    matrices: float
    """Of products with weights, routed experts' apart."""
    experts: float
    attention: float
    elementwise: float
    optimizer: float
    waiting: float
    """For messages that computation needs at once: of tensor and context parallelism, and tokens
    on their way to experts and back.
    """
    exposed: float
    """For FSDP's, HSDP's and Muon's, as far as computation can't hide them."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(vars(self).values())


PARTS = {
    "matrices": "products with weights",
    "experts": "routed experts",
    "attention": "attention",
    "elementwise": "element-wise operators, casts, copies",
    "optimizer": "optimizer",
    "waiting": "waiting for messages that the next operator needs",
    "exposed": "waiting for FSDP, HSDP and Muon",
}
"""StepTime's parts as people read them."""


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
    experts = work(EXPERTS, False) / matmul
    attention = work(ATTENTION, False) / (gpu.bf16_flops * assumed.attention_efficiency)
    optimizer = work(MATRICES, True) / matmul + trace.moved.get("optimizer", 0.0) / bandwidth
    optimizer += 2 * trace.offloaded / (gpu.host * assumed.link_efficiency)  # there and back
    computing = matrices + experts + attention + moved / bandwidth
    muon = sum(sent(t) for t in trace.traffic if t.name == "Muon")
    others = sum(sent(t) for t in trace.traffic if not t.blocking and t.name != "Muon")
    return StepTime(
        matrices=matrices,
        experts=experts,
        attention=attention,
        elementwise=moved / bandwidth,
        optimizer=optimizer,
        waiting=sum(sent(t) for t in trace.traffic if t.blocking),
        exposed=max(0.0, others - assumed.overlap * computing) + max(0.0, muon - assumed.overlap * optimizer),
    )
