"""A plan's FLOPs are those that torch's flop counter sees in a real step."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.planned import VARIANTS, config_of, small_recipe
from helpers.tiny import MOTIF_3
from motif_kernels.flops import diff_attention_backward_flops, diff_attention_flops, visible_pairs
from motifarch.models.motif import MotifForCausalLM
from motifarch.plan import find_gpu, make_plan
from motifarch.train.recipe import ModelSection

SEQ_LEN, ROWS = 48, 2


def planned(recipe: Any, gpus: int = 1) -> dict[str, float]:
    return make_plan(recipe, find_gpu("h100"), gpus, seq_len=SEQ_LEN).flops_per_token


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_the_flop_counters(variant: str, window: int | None) -> None:
    """On the reference backend the counter sees whole maps: the mask takes a share."""
    fields = {} if window is None else {"model__use_sliding_window": True, "model__sliding_window": window}
    recipe = small_recipe(variant, batch__size=ROWS, batch__micro_size=ROWS, **fields)
    recipe.model.attn_implementation = "eager"
    torch.manual_seed(0)
    model = MotifForCausalLM(config_of(recipe, "eager")).train()
    ids = torch.randint(0, 320, (ROWS, SEQ_LEN))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, shift_labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    maps = counts.pop(torch.ops.aten.bmm)
    # Summed by hand: query i sees i + 1 keys, or the window.
    visible = sum(min(i + 1, window or SEQ_LEN) for i in range(SEQ_LEN)) / SEQ_LEN**2
    real = (sum(counts.values()) + maps * visible) / (ROWS * SEQ_LEN)
    found = planned(recipe)
    assert found["forward"] + found["backward"] == pytest.approx(real, rel=1e-2)
    assert found["forward attention"] + found["backward attention"] == pytest.approx(
        maps * visible / (ROWS * SEQ_LEN), rel=1e-2
    )
    assert found["recompute"] == 0


def test_attention_is_counted_as_the_kernels_compute_it() -> None:
    """A noise map once a group, its dP and dV shared with the group's."""
    recipe = small_recipe()
    pairs = visible_pairs(SEQ_LEN, SEQ_LEN, True)
    layers, shape = recipe.model.num_hidden_layers, (8, 4, 8, 16)  # signal and noise heads, D, Dv
    found = planned(recipe)
    assert found["forward attention"] == pytest.approx(layers * diff_attention_flops(pairs, *shape) / SEQ_LEN)
    assert found["backward attention"] == pytest.approx(layers * diff_attention_backward_flops(pairs, *shape) / SEQ_LEN)
    assert found["forward"] == pytest.approx(MotifForCausalLM(config_of(recipe)).flops_per_token(SEQ_LEN) / 3, rel=1e-2)


@pytest.mark.slow
def test_experts_and_the_other_parts_of_motif_3_are_counted() -> None:
    recipe = small_recipe()
    recipe.model = ModelSection(**MOTIF_3, vocab_size=320)
    found, model = planned(recipe), MotifForCausalLM(config_of(recipe))
    assert found["forward"] == pytest.approx(model.flops_per_token(SEQ_LEN) / 3, rel=1e-2)


@pytest.mark.parametrize(
    "fields", [{"parallel__tensor": 2}, {"parallel__context": 2}, {"parallel__replicate": 2}, {"batch__micro_size": 1}]
)
def test_flops_of_a_token_do_not_depend_on_the_layout(fields: dict[str, Any]) -> None:
    whole = planned(small_recipe())
    cut = planned(small_recipe(**fields), gpus=4)
    assert cut == pytest.approx(whole, rel=1e-6)


def test_what_is_computed_again_is_apart() -> None:
    plain, full = planned(small_recipe()), planned(small_recipe(activation_checkpointing="full"))
    half = planned(small_recipe(activation_checkpointing=2))
    selective = planned(small_recipe(activation_checkpointing="selective"))
    for other in (full, half, selective):
        assert other["forward"] == plain["forward"]
        assert other["backward"] == plain["backward"]
    assert full["recompute attention"] == plain["forward attention"]
    assert half["recompute"] == full["recompute"] / 2  # every second of two layers
    assert 0.5 * plain["forward"] < full["recompute"] < plain["forward"]
    assert selective["recompute"] == 0
