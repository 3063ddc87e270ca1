"""Depth: new blocks that are the identity, and the constants of those that they move."""

import pytest
import torch

from helpers.grown import grown, largest_difference, loaded, saved
from helpers.models import VARIANTS, random_ids
from motifarch.growth import SourceFolder, deepen, describe
from motifarch.growth.depth import interleaved


@pytest.mark.parametrize(
    ("old", "new", "fresh"),
    [
        (32, 40, [4, 9, 14, 19, 24, 29, 34, 39]),  # one after every four blocks
        (4, 6, [2, 5]),
        (2, 5, [1, 3, 4]),
        (1, 3, [1, 2]),
        (3, 4, [3]),
    ],
)
def test_new_blocks_are_spread_evenly(old, new, fresh):
    places = interleaved(old, new)
    assert [i for i, (_, is_new) in enumerate(places) if is_new] == fresh
    assert [i for i, is_new in places if not is_new] == list(range(old))
    assert all(places[i - 1][0] == places[i][0] for i in fresh)  # each copies the block before it


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_stays(tmp_path, variant):
    source = saved(tmp_path / "small", variant, num_hidden_layers=3, initializer_range=0.1, use_bias=True)
    output = grown(source, layers=5)
    assert largest_difference(source, output) < 1e-5
    assert largest_difference(source, output, torch.float64) < 1e-6


@pytest.mark.parametrize(
    "overrides", [{"sub_norm": False}, {"lambda_init": 0.2}, {"lambda_init_depth_offset": 3}], ids=str
)
def test_other_constants(tmp_path, overrides):
    source = saved(tmp_path / "small", num_hidden_layers=3, initializer_range=0.1, **overrides)
    assert largest_difference(source, grown(source, layers=7)) < 1e-5


@torch.no_grad()
def test_every_block_computes_what_it_did_and_new_ones_nothing(tmp_path):
    source = saved(tmp_path / "small", num_hidden_layers=4)
    output = grown(source, layers=6)
    small, large = loaded(source), loaded(output)
    ids = random_ids(2, 19)
    before, after = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (small, large))
    # What each block reads; those of the larger model are 0, 1, a new one, 2, 3, a new one.
    for mine, theirs in ((0, 0), (1, 1), (2, 2), (3, 2), (4, 3)):
        torch.testing.assert_close(after[mine], before[theirs], rtol=1e-4, atol=1e-4)
    assert torch.equal(after[2], after[3])
    lambdas = [float(layer.self_attn.compute_lambda()) for layer in large.model.layers]
    expected = [float(layer.self_attn.compute_lambda()) for layer in small.model.layers]
    assert lambdas == pytest.approx([expected[i] for i in (0, 1, 1, 2, 3, 3)], abs=1e-6)


def test_new_blocks_learn(tmp_path):
    source = saved(tmp_path / "small")
    model, ids = loaded(grown(source, layers=3)).train(), random_ids(4, 19)
    new = model.model.layers[2]
    assert new.self_attn.o_proj.weight.abs().max() == new.mlp.down_proj.weight.abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new.parameters())


@torch.no_grad()
def test_bfloat16_keeps_lambda_and_says_that_it_rounds_the_sub_norm(tmp_path):
    source = saved(tmp_path / "small", num_hidden_layers=4, head_dim=64, dtype=torch.bfloat16, initializer_range=0.1)
    (step,) = deepen(describe(SourceFolder(source)), 6).steps
    assert "bfloat16 that is rounded, by up to 0.39%" in step.loss
    assert "--dtype float32" in step.loss
    output = grown(source, layers=6)
    small, large = loaded(source), loaded(output)
    assert large.dtype == torch.bfloat16
    lambdas = [float(layer.self_attn.compute_lambda()) for layer in large.model.layers]
    expected = [float(layer.self_attn.compute_lambda()) for layer in small.model.layers]
    assert lambdas == pytest.approx([expected[i] for i in (0, 1, 1, 2, 3, 3)], abs=5e-6)
    exact = grown(source, "exact", layers=6, dtype=torch.float32)
    assert largest_difference(source, exact, torch.float32) < 1e-5
    assert largest_difference(source, output, torch.float32) > 1e-4


@pytest.mark.parametrize("variant", ["diff_v2", "softmax"])
def test_attention_without_such_constants_is_exact_in_bfloat16(tmp_path, variant):
    source = saved(tmp_path / "small", variant, dtype=torch.bfloat16)
    assert deepen(describe(SourceFolder(source)), 3).steps[0].loss is None
    assert largest_difference(source, grown(source, layers=3)) == 0
