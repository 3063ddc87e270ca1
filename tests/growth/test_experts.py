"""Dense blocks become experts: the same function, or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.grown import largest_difference, loaded, saved
from helpers.models import random_ids
from motifarch.commands.grow import main
from motifarch.errors import UserError
from motifarch.growth import Experts, Factors, SourceFolder, describe, grow, upcycle

SMALL = {"initializer_range": 0.1}
CASES: dict[str, tuple[str, Experts]] = {
    "PolyNorm": ("gda", Experts(6, 2)),
    "as Motif-3's": ("gda 4:1", Experts(8, 3, shared=1, dense_first=1, route_scale=2.0)),
    "SwiGLU": ("softmax", Experts(5, 5, shared=2, route_scale=0.7)),
    "fine-grained": ("softmax", Experts(12, 6, granularity=3, shared=4, route_scale=2.0)),
    "some layers": ("gda", Experts(4, 1, dense_first=1, every=2)),
}


def upcycled(folder: Path, experts: Experts, **options: object) -> Path:
    grow(folder, folder.with_name("experts"), Factors(**options), experts=experts, check=False)
    return folder.with_name("experts")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "fine-grained" else pytest.mark.slow) for case in CASES]
)
def test_experts_start_as_the_dense_function(tmp_path: Path, case: str) -> None:
    """Though tokens go to several of them, and take several."""
    variant, experts = CASES[case]
    source = saved(tmp_path / "source", variant, num_hidden_layers=3, **SMALL)
    assert largest_difference(source, upcycled(source, experts)) < 2e-5
    model = loaded(tmp_path / "experts")
    layers = model.model.expert_layers()
    assert list(layers) == list(range(experts.dense_first, 3, experts.every))
    model.train()(random_ids(4, 19))
    for moe in layers.values():
        assert len(moe.tokens_per_expert.unique()) > 1 or experts.num_experts == experts.top_k
        assert (moe.top_k, moe.router.route_scale) == (experts.top_k, experts.route_scale)


@pytest.mark.slow
def test_experts_become_different(tmp_path: Path) -> None:
    """Router, experts and the silent shared expert: two steps change all of them."""
    source = saved(tmp_path / "source", **SMALL)
    model = loaded(upcycled(source, Experts(4, 2, shared=1))).train()
    before, ids = {name: p.detach().clone() for name, p in model.named_parameters()}, random_ids(4, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    down = model.model.layers[0].moe.experts.down_proj
    assert all((down[0] - other).abs().max() > 1e-3 for other in down[1:])


def test_experts_go_with_growth_and_hyper_connections(tmp_path: Path) -> None:
    """From the command line, in bfloat16, with noise that is said."""
    source = saved(tmp_path / "source", "gda 4:1", dtype=torch.bfloat16, **SMALL)
    options = ["--experts", "4", "--top-k", "2", "--shared-experts", "1", "--route-scale", "2"]
    assert main([str(source), str(tmp_path / "all"), "--hidden", "2", "--streams", "4", *options]) == 0
    record = json.loads((tmp_path / "all" / "growth.json").read_text())
    assert [step["loss"] for step in record["steps"]] == [None] * 3
    assert record["logits"]["largest"] < 2e-3  # hyper-connections in bfloat16, of logits of about 1
    held = load_file(tmp_path / "all" / "model.safetensors")
    assert {t.dtype for name, t in held.items() if not name.endswith("expert_bias")} == {torch.bfloat16}
    dense = SourceFolder(source).read("model.layers.0.mlp.down_proj.weight")
    experts = held["model.layers.0.moe.experts.down_proj"]
    assert torch.equal(experts[:, : dense.shape[0]], (dense / 2).expand(4, -1, -1))
    noisy = upcycled(source, Experts(4, 2, noise=0.1, seed=3))
    assert "noise of 0.1 standard deviations" in json.loads((noisy / "growth.json").read_text())["steps"][0]["loss"]
    matrices = SourceFolder(noisy).read("model.layers.0.moe.experts.down_proj").float()
    spread = (matrices - dense.float()).flatten(1).std(1) / dense.float().std()
    torch.testing.assert_close(spread, torch.full((4,), 0.1), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("variant", "experts", "message"),
    [
        ("gda", Experts(4, 5), "--top-k is 5 with --experts 4"),
        ("gda", Experts(4, 2, granularity=2), "PolyNorm's norms are over all of a block's columns"),
        ("softmax", Experts(10, 5, granularity=5), "--granularity 5 does not divide the intermediate size, 48"),
        ("softmax", Experts(6, 3, granularity=2), "must be multiples of --granularity 2"),
        ("gda", Experts(4, 2, dense_first=2), "leaves none of the 2 layers"),
    ],
    ids=str,
)
def test_what_is_not_the_same_function_is_refused(tmp_path: Path, variant: str, experts: Experts, message: str) -> None:
    with pytest.raises(UserError, match=message):
        upcycle(describe(SourceFolder(saved(tmp_path, variant))), experts)


def test_what_has_no_place_for_experts_is_refused(tmp_path: Path) -> None:
    biased = describe(SourceFolder(saved(tmp_path / "biased", use_bias=True)))
    with pytest.raises(UserError, match="have biases"):
        upcycle(biased, Experts(4, 2))
    sparse = upcycle(describe(SourceFolder(saved(tmp_path / "source"))), Experts(4, 2))
    with pytest.raises(UserError, match="has 4 experts already"):
        upcycle(sparse, Experts(4, 2))
    source = upcycled(tmp_path / "source", Experts(4, 2))
    for option, message in (("--hidden", "with experts does not grow in width"), ("--layers", "grow in depth")):
        with pytest.raises(UserError, match=message):
            main([str(source), str(tmp_path / "none"), option, "4"])
    with pytest.raises(UserError, match="experts need --experts and --top-k too"):
        main([str(source), str(tmp_path / "none"), "--granularity", "4"])
    assert not (tmp_path / "none").exists()
