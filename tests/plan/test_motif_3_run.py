"""A plan's bytes of Motif-3 are those that real ranks, which share its experts, allocate."""

import json
from typing import Any

import pytest

from helpers.distributed import on_ranks
from helpers.motif_3_ranks import RANKS, SEQ_LEN, measure_motif_3, recipe
from motifarch.plan import Assumptions, find_gpu, make_plan, memory

pytestmark = pytest.mark.nightly

# With the experts that all tokens take. Of six a rank has three, so [0, 3] send each rank as many
# rows, which is what a plan assumes unless told, and [0, 1] send all to the first: no load is a
# matter of luck. With [] routers choose, and the plan is told the busiest rank's load.
CASES: dict[str, tuple[Any, list[int]]] = {
    "even": (recipe(), [0, 3]),
    "all to one rank": (recipe(), [0, 1]),
    "as routers choose": (recipe(), []),
    "AdamW": (recipe(optim__name="adamw"), [0, 3]),
    "bfloat16": (recipe(precision__compute="bfloat16"), [0, 3]),
    "selective recomputation": (recipe(activation_checkpointing="selective"), [0, 3]),
    "full recomputation": (recipe(activation_checkpointing="full"), [0, 3]),
    "layers stay gathered": (recipe(parallel__reshard_after_forward=0.5), [0, 3]),
    "experts stay gathered": (recipe(parallel__reshard_experts=False, batch__micro_size=1), [0, 3]),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each real rank held, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(RANKS, measure_motif_3, folder, CASES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_real_ranks(case: str, measured: list[dict[str, Any]]) -> None:
    ranks = [rank for rank in range(RANKS) if measured[rank][case]["load"] >= 1]
    for rank in {ranks[0], ranks[-1]}:
        real = measured[rank][case]
        assumed = Assumptions(expert_load=real["load"])
        plan = make_plan(CASES[case][0], find_gpu("h100"), RANKS, seq_len=SEQ_LEN, rank=rank, assumptions=assumed)
        trace = plan.trace
        kinds = {"parameters": memory.PARAMETERS, "gradients": memory.GRADIENTS, "optimizer": memory.OPTIMIZER}
        for name, kind in kinds.items():
            assert getattr(trace, name) == real[name]["all"] > 0
            assert trace.experts[kind] == real[name]["experts"] > 0
        # What FSDP2 has gathered then is the root's parameters, and the last layer's message.
        kept = real["forward pass over"] - trace.outside_layers - trace.largest_layer
        assert kept == pytest.approx(trace.activations, rel=5e-2)
        held = trace.parameters + trace.optimizer
        assert real["peak"] + held == pytest.approx(plan.peak, rel=5e-2)
