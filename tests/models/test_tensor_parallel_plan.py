"""The plan that the model declares to transformers: from_pretrained(tp_plan="auto") on two real
ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.models import tiny_config, tiny_model
from helpers.tensor_parallel_plan import load_and_run, run
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.models.motif.tensor_parallel import check_shared_heads

# Heads, words and columns that two ranks can share; tied weights and norms of queries and keys are
# in one each.
CASES: dict[str, dict[str, Any]] = {
    "gda": {},
    "gda tied": {},
    "gda narrow": {},
    "diff_v1": {},
    "diff_v2 gated": {"num_key_value_heads": 2},
    "softmax": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each kind."""
    root = tmp_path_factory.mktemp("plans")
    for name, overrides in CASES.items():
        tiny_model(name, vocab_size=98, **overrides).save_pretrained(root / name)
    return {name: root / name for name in CASES}


@pytest.fixture(scope="module")
def shared(folders: dict[str, Path]) -> dict[str, Any]:
    """What two ranks make of them."""
    output = folders["gda"].with_name("results.pt")
    on_ranks(2, load_and_run, list(folders.values()), output)
    return torch.load(output)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_gives(folders: dict[str, Path], shared: dict[str, Any], name: str) -> None:
    model = MotifForCausalLM.from_pretrained(folders[name])
    whole = sum(p.numel() for p in model.parameters())
    expected, found = run(model), shared[name]
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    for cache in ("dynamic", "static"):
        assert torch.equal(found[cache], expected[cache])
        assert found[cache].shape[1] == 18
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    # Norms, lambdas and PolyNorm's few numbers are all that a rank has whole.
    assert found["held"] < 0.55 * whole
    assert all(dict(model.named_parameters())[key].ndim == 1 for key in found["whole"])


@pytest.mark.parametrize("name", ["gda", "gda tied"])
def test_what_two_ranks_save_is_the_model(folders: dict[str, Path], shared: dict[str, Any], name: str) -> None:
    first = MotifForCausalLM.from_pretrained(folders[name])
    again = MotifForCausalLM.from_pretrained(folders[name].with_name(f"{name} saved"))
    torch.testing.assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_heads_that_do_not_divide_are_refused() -> None:
    layers = tiny_model("gda").model.layers
    with pytest.raises(ValueError, match=r"4 ranks .* the 2 noise heads .* tp_size may be 1, 2$"):
        check_shared_heads(layers[0].self_attn, 4)
    with pytest.raises(ValueError, match=r"2 ranks .* the 1 key/value heads .* tp_size may be 1$"):
        check_shared_heads(tiny_model("gda narrow", num_key_value_heads=1).model.layers[0].self_attn, 2)
    with pytest.raises(ValueError, match=r"2 ranks .* the 1 key/value heads .* tp_size may be 1$"):
        check_shared_heads(tiny_model("diff_v2 gated").model.layers[0].self_attn, 2)
    check_shared_heads(layers[0].self_attn, 2)


def test_every_rule_names_something_and_none_is_saved(tmp_path: Path) -> None:
    for name, overrides in CASES.items():
        model = tiny_model(name, **overrides)
        names = {n.replace(".0.", ".*.") for n, _ in model.named_modules()}
        assert set(model.tp_plan) <= names
        assert {"lm_head", "model.embed_tokens", "model.layers.*.self_attn"} <= set(model.tp_plan)
    config = tiny_config("gda")
    config.save_pretrained(tmp_path)
    assert "tp_plan" not in (tmp_path / "config.json").read_text()
    assert MotifConfig.from_pretrained(tmp_path).base_model_tp_plan == config.base_model_tp_plan
