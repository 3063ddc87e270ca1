"""What a plan says of routed experts that ranks share."""

import dataclasses
from functools import cache

import pytest

from helpers.planned import SEQ_LEN, small_recipe
from helpers.tiny import MOTIF_3
from motifarch.plan import GPUS, Assumptions, make_plan, memory
from motifarch.plan.dry_run import even_routing
from motifarch.plan.planning import Plan
from motifarch.plan.report import plain, render, to_json
from motifarch.train.recipe import ModelSection

LAYERS = 2  # of MOTIF_3's three layers, those with experts


@cache
def planned(load: float, context: int = 1) -> Plan:
    """On 4 ranks, 2 to an NVLink domain and 2 to share experts; a micro-batch of one row."""
    layout = {"parallel__expert": 2, "parallel__context": context}
    recipe = small_recipe(**layout, optim__name="muon", batch__micro_size=1, batch__size=4 // context)
    recipe.model = ModelSection(**MOTIF_3, vocab_size=320)
    gpu = dataclasses.replace(GPUS["b200"], domain=2)
    return make_plan(recipe, gpu, 4, seq_len=SEQ_LEN, assumptions=Assumptions(expert_load=load))


def sent(plan: Plan, name: str) -> dict[str, float]:
    return {f"{t.kind} over {t.link}": t.sent for t in plan.trace.traffic if t.name == name}


def test_tokens_travel_within_the_node_and_experts_parameters_between_nodes() -> None:
    plan = planned(1.0)
    rows = SEQ_LEN * MOTIF_3["experts_top_k"]
    # There and back, forward and backward, half of the rows of float32; and how many there are.
    tokens = LAYERS * (4 * rows / 2 * MOTIF_3["hidden_size"] * 4 + MOTIF_3["num_experts"] / 2 * 4)
    assert sent(plan, "experts: dispatch, combine") == {"all-to-all over NVLink": pytest.approx(tokens)}
    whole = 2 * plan.trace.experts[memory.PARAMETERS]  # two ranks share a rank's experts
    traffic = sent(plan, "experts: FSDP")
    assert traffic["all-gather over network"] == 2 * whole / 2
    assert traffic["reduce-scatter over network"] == whole / 2


def test_experts_have_rows_of_their_own() -> None:
    plan = planned(1.0)
    width = MOTIF_3["hidden_size"] * MOTIF_3["moe_intermediate_size"]
    numbers = LAYERS * 2 * (3 * width + 4)  # of three experts the first of two ranks has two
    found = to_json(plan)["memory"]["most_bytes"]
    assert found["experts' parameters"] == found["experts' gradients"] == 4 * numbers
    assert found["parameters"] + found["experts' parameters"] == plan.trace.parameters
    assert 4 * numbers <= found["experts' optimizer state"] < 4.1 * numbers  # momentum, Adam's for PolyNorm
    assert "experts' optimizer state" in plain(render(plan, "x"))


def test_a_higher_load_costs_time_and_memory_but_no_work() -> None:
    even, busy = planned(1.0), planned(2.0)
    assert busy.time.experts == pytest.approx(2 * even.time.experts)
    assert busy.time.waiting > 1.5 * even.time.waiting
    assert busy.trace.activations > even.trace.activations
    assert busy.tokens_per_second < even.tokens_per_second
    assert busy.flops_per_token == pytest.approx(even.flops_per_token)
    assert busy.memory["parameters"] == even.memory["parameters"]
    assert "--expert-load 2" in plain(render(busy, "x"))


def test_halo_and_ulysses_are_told_apart() -> None:
    plan = planned(1.0, context=2)
    window, width = MOTIF_3["sliding_window"], MOTIF_3["kv_lora_rank"] + MOTIF_3["qk_rope_head_dim"]
    layers = 2  # the second of three, and that of multi-token prediction
    # Latents of keys and values to the rank after, and their gradients back.
    (halo,) = sent(plan, "halo").values()
    assert halo == 2 * layers * window * width * 4
    assert sent(plan, "Ulysses").keys() == {"all-to-all over NVLink"}


def test_even_routing_deals_out_all_rows() -> None:
    sends, receives = even_routing(10, 4, 1.5)()
    assert sum(sends) == 10
    assert max(sends) - min(sends) <= 1
    assert sum(receives) == pytest.approx(15, abs=2)
