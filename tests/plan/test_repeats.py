"""A tall stack's plan follows from two short ones'."""

from typing import Any

import pytest

from helpers.planned import SEQ_LEN, config_of, small_recipe
from helpers.tiny import MOTIF_3
from motifarch.plan import find_gpu, make_plan, planning
from motifarch.plan.planning import layer_kinds
from motifarch.plan.repeats import Repeat, find_repeat
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import ModelSection


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("aaaaaaaaaa", Repeat(layers=3, prefix=0, period=1, times=7)),
        ("aaaa", None),
        ("fwwwfwwwfwwwfwwwfwwwf", Repeat(layers=5, prefix=0, period=4, times=4)),
        ("abcdefghij", None),
        ("DdwwfwwwfwwwfwwwfwwwF", None),  # the last one is of its own kind
    ],
)
def test_the_shortest_stacks_are_found(layers: str, expected: Repeat | None) -> None:
    assert find_repeat(layers) == expected


def test_motif_3_is_planned_by_fourteen_layers_of_53() -> None:
    recipe = read_recipe(["recipes/motif_3/base.yaml"])
    repeat = find_repeat(layer_kinds(recipe, config_of(recipe)))
    assert repeat == Repeat(layers=5, prefix=2, period=4, times=12)


CASES: dict[str, dict[str, Any]] = {
    "FSDP": {},
    "micro-batches": {"batch__micro_size": 1, "activation_checkpointing": "selective"},
    "HSDP, every third recomputed": {"parallel__replicate": 2, "activation_checkpointing": 3},
    "Motif-3, full recomputation": {"activation_checkpointing": "full", "optim__name": "muon"},
    "Motif-3, shared experts": {"parallel__replicate": 2, "parallel__expert": 2, "activation_checkpointing": "full"},
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "FSDP" else [pytest.mark.slow]) for c in CASES])
def test_a_tall_stack_is_planned_as_if_it_were_traced(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(**CASES[case])
    if case.startswith("Motif-3"):
        recipe.model = ModelSection(**MOTIF_3, vocab_size=320)
    recipe.model.num_hidden_layers = 8 if case == "FSDP" else 14

    def plan() -> Any:
        return make_plan(recipe, find_gpu("h100"), 4 * recipe.parallel.replicate, seq_len=SEQ_LEN)

    short = plan()
    monkeypatch.setattr(planning, "find_repeat", lambda layers: None)
    whole = plan()
    for name in ("parameters", "parameter_count", "gradients", "optimizer", "experts", "activations", "peak_phase"):
        assert getattr(short.trace, name) == getattr(whole.trace, name), name
    assert short.flops_per_token == pytest.approx(whole.flops_per_token, rel=1e-9)
    # Muon deals matrices out to ranks, never quite evenly.
    close = 1e-1 if recipe.optim.name == "muon" else 1e-9
    assert short.peak == pytest.approx(whole.peak, rel=min(close, 1e-3))
    assert short.memory == pytest.approx(whole.memory, rel=close)
    assert short.trace.moved == pytest.approx(whole.trace.moved, rel=close)
    assert short.trace.flops == pytest.approx(whole.trace.flops, rel=close)
    for one, other in zip(short.trace.traffic, whole.trace.traffic, strict=True):
        assert (one.name, one.kind, one.link) == (other.name, other.kind, other.link)
        assert one.sent == pytest.approx(other.sent, rel=close)
        assert one.calls == other.calls
