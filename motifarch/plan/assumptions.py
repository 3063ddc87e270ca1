"""What a plan takes for granted."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

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

    expert_load: Annotated[float, Field(ge=1, le=1000)] = 1.2
    """With `parallel.expert`: tokens that the busiest rank's experts get over the mean. The busiest
    expert of a small Motif-3, well balanced, had 1.17 times the mean.
    """

    reserve: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Part of the memory left to the CUDA context, NCCL's buffers and the allocator's fragments."""


ASSUMPTIONS = TypedYaml(Assumptions, "assumption")
