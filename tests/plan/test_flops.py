"""A plan's FLOPs are those that torch's flop counter sees in a real step."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.planned import VARIANTS, config_of, small_recipe
from helpers.tiny import MOTIF_3
from motif_kernels.flops import diff_attention_backward_flops, diff_attention_flops, visible_pairs
from motifarch.models.motif import MotifForCausalLM
from motifarch.plan import find_gpu, make_plan
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import ModelSection, OptimSection

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
def test_flops_of_motif_3_are_the_flop_counters() -> None:
    """Experts, hyper-connections and multi-token prediction included. The counter sees attention as
    products of whole maps, by torch's own formula; it counts rows of experts, wherever they go.
    """
    recipe = small_recipe(batch__size=ROWS, batch__micro_size=ROWS)
    # Twice as wide as elsewhere: attention is as little of the work as in the released model.
    wide = MOTIF_3 | {name: 2 * MOTIF_3[name] for name in ("hidden_size", "intermediate_size", "moe_intermediate_size")}
    recipe.model = ModelSection(**wide, vocab_size=320)
    torch.manual_seed(0)
    model = MotifForCausalLM(config_of(recipe, "eager")).train()
    ids = torch.randint(0, 320, (ROWS, SEQ_LEN))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, shift_labels=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
    counts, tokens = counter.get_flop_counts(), ROWS * SEQ_LEN
    maps = hidden = 0.0
    windows = [None, MOTIF_3["sliding_window"], None, MOTIF_3["sliding_window"]]  # a query sees itself too
    for name, window in zip(["layers.0", "layers.1", "layers.2", "mtp_layers.0"], windows, strict=True):
        whole = counts[f"MotifForCausalLM.model.{name}.self_attn"][torch.ops.aten.bmm]
        seen = sum(min(i + 1, SEQ_LEN if window is None else window + 1) for i in range(SEQ_LEN)) / SEQ_LEN**2
        maps, hidden = maps + whole * seen, hidden + whole * (1 - seen)
    real = counter.get_total_flops() - hidden

    by_maps = planned(recipe_with(recipe, "eager"))
    assert by_maps["forward"] + by_maps["backward"] == pytest.approx(real / tokens, rel=1e-2)
    assert by_maps["forward attention"] + by_maps["backward attention"] == pytest.approx(maps / tokens, rel=1e-2)
    # Backward the kernel multiplies S once more, and dP and dV once for a group.
    by_kernel = planned(recipe)
    assert by_kernel["forward"] + by_kernel["backward"] == pytest.approx(real / tokens, rel=1e-2)
    assert by_kernel["forward"] == pytest.approx((forward - hidden / 3) / tokens, rel=1e-2)  # 2 of a map's 6 products


def recipe_with(recipe: Any, attention: str) -> Any:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, attn_implementation=attention))


@pytest.mark.slow
def test_flops_of_the_released_motif_3_are_those_computed_from_its_shapes() -> None:
    """A token's 12.08 billion weights without embedding and multi-token prediction, and attention
    to 2,048.5 keys in 14 layers and at most 129 in 39, 80 heads of 192 and 128 numbers.
    """
    recipe = read_recipe(["recipes/motif_3/base.yaml"])
    recipe.model.num_nextn_predict_layers, recipe.activation_checkpointing = 0, "none"
    recipe.optim = OptimSection(name="adamw")  # is no part of this, and soon planned
    found = make_plan(recipe, find_gpu("b200"), 8, seq_len=4096).flops_per_token
    assert 3 * found["forward attention"] == pytest.approx(5.2e9, rel=1e-2)
    assert 3 * (found["forward"] - found["forward attention"]) == pytest.approx(72.5e9, rel=1e-2)
    backward = found["backward"] - found["backward attention"]
    assert backward == pytest.approx(2 * (found["forward"] - found["forward attention"]), rel=1e-2)


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
