"""Every family that can be patched, with its real ratio of heads."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.encoders import ENCODERS
from helpers.host_models import (
    EXPERTS,
    HEADS,
    LATENT,
    ONLY_EXPERTS,
    RATIOS,
    families,
    host_config,
    host_model,
    left_padded,
    moved,
    token_ids,
)
from motifarch.integrations import load_patched, patch
from motifarch.integrations.families import FAMILIES, Forward

PAGE = Path(__file__).parents[2] / "docs" / "patching.md"
EXACT = families(family for family in HEADS if family not in LATENT)


def patched(family: str, **options: Any) -> tuple[Any, Any]:
    model = host_model(family)
    defaults: dict[str, Any] = {"ratio": RATIOS[family]}
    if family in EXPERTS:
        defaults["experts"] = "swap" if family in ONLY_EXPERTS else "keep"
    return model, patch(model, **(defaults | options))


def test_the_table_and_the_tests_name_the_same_families() -> None:
    assert set(FAMILIES) == {*HEADS, *ENCODERS}


def test_the_page_has_every_family_and_the_ratios_that_fit_it() -> None:
    named = set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not (line.startswith("| `") and len(cells) == 4 and cells[2][0].isdigit()):
            continue
        types, _, heads, ratios = cells
        named |= set(re.findall("`(.*?)`", types))
        queries, *keys = (int(n) for n in re.findall(r"\d+", heads))
        if "latent" in heads:
            assert ratios == f"every divisor of {queries}"
        else:
            fitting = [r for r in range(1, queries + 1) if queries % r == 0 and queries // r % keys[0] == 0]
            assert ratios == ", ".join(map(str, fitting)), line
    assert named == set(FAMILIES)


@pytest.mark.parametrize("family", families())
def test_the_table_says_how_a_familys_forward_goes(family: str) -> None:
    """As it is seen when it runs."""
    model, _ = patched(family)
    assert {Forward(**forward) for forward in model.config.motifarch_patch["forwards"].values()} == {FAMILIES[family]}


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize(
    "options", [{"attention": "gda"}, {"attention": "diff_v2", "ratio": 1}], ids=["gda", "diff_v2"]
)
def test_a_patched_model_starts_as_its_host(family: str, options: dict[str, Any]) -> None:
    host = host_model(family)
    host.set_attn_implementation("eager")  # the others leave Gemma 2's softcap out
    model, report = patched(family, **options)
    assert report.exact
    ratio = options.get("ratio", RATIOS[family])
    now = {name.replace("q_norm.signal", "q_norm"): parameter for name, parameter in model.named_parameters()}
    for name in [name for name in now if family == "phi3" and ".q_proj." in name]:  # its projections were one
        rows = [now.pop(name.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")]
        rows[0] = rows[0][: rows[0].shape[0] * ratio // (ratio + 1)]
        now[name.replace("q_proj", "qkv_proj")] = torch.cat(rows)
    for name, parameter in host.named_parameters():  # nothing lost; noise heads lie behind the host's
        rows = len(parameter) if name in report.grown else None
        assert torch.equal(now[name][:rows], parameter)
    ids = token_ids(2, 17)  # longer than the windows
    batch = left_padded([token_ids(17, seed=2), token_ids(9, seed=3), token_ids(4, seed=4)])
    right = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    packed = {"input_ids": token_ids(1, 20), "position_ids": torch.cat([torch.arange(n) for n in (9, 8, 3)])[None]}
    with torch.no_grad():
        assert host(ids).logits.std() > 0.3
        for inputs in ({"input_ids": ids}, batch, right, {**packed, "use_cache": False}):
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            torch.testing.assert_close(model(**inputs).logits[real], host(**inputs).logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
@pytest.mark.parametrize("family", families())
def test_it_halves_its_loss_with_a_gradient_in_every_new_parameter(family: str, attention: str) -> None:
    model, report = patched(family, attention=attention, feed_forward="polynorm")
    model.train()
    ids = token_ids(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert {n for n in report.added if gradients[n] is None or not gradients[n].abs().max() > 0} == set()


@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
@pytest.mark.parametrize("family", families())
def test_it_generates_the_same_with_any_cache_and_with_padding(family: str, attention: str) -> None:
    model, _ = patched(family, attention=attention)
    moved(model)
    prompts = [token_ids(11, seed=5), token_ids(7, seed=6), token_ids(3, seed=7)]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(p[None], **options, use_cache=False)[0, len(p) :].tolist() for p in prompts]
    assert len({tuple(tokens) for tokens in alone}) > 1
    for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        tokens = model.generate(**left_padded(prompts), **options, **cache)[:, len(prompts[0]) :].tolist()
        assert tokens == alone, cache


@pytest.mark.parametrize("family", families())
def test_it_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    # As a released model comes: from a folder, whose experts lie one by one.
    host_model(family).save_pretrained(tmp_path / "host")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    experts = {"experts": "swap"} if family in EXPERTS else {}
    patch(model, attention="gda", ratio=RATIOS[family], feed_forward="polynorm", **experts)
    moved(model).save_pretrained(tmp_path / "patched")
    ids = token_ids(2, 17)
    expected = model(ids).logits
    loaded = load_patched(tmp_path / "patched")
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "patched")(ids).logits, expected)


@pytest.mark.parametrize("family", families())
def test_real_head_counts_fit(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(host_config(family, divisor=1))
    heads, kv_heads = HEADS[family]
    ratio = RATIOS[family]
    report = patch(model, ratio=ratio)
    attention = next(m for n, m in model.named_modules() if n == "model.layers.0.self_attn")
    assert attention.noise_heads == heads // ratio
    assert attention.k_proj.out_features == (heads // ratio if family in LATENT else kv_heads) * attention.head_dim
    assert all(p.is_meta for p in model.parameters())
    assert report.exact is (family not in LATENT)
