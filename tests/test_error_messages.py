"""Troubleshooting lists every message: what raise statements say, and what users were told."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from error_messages import PACKAGES, ROOT, as_html, collect

from motif_kernels import diff_attn_func
from motifarch.integrations.unilm import attention_from_unilm
from motifarch.layers import GroupedDifferentialAttention
from motifarch.layout import Layout
from motifarch.models.motif import MotifConfig
from motifarch.train.recipe import RECIPES
from motifarch.train.recipe_rules import check_recipe

COLLECTED = collect()


def test_the_first_words_of_every_raise_are_listed() -> None:
    """Found by a search of the text, where they are collected from its syntax tree."""
    listed = {path: " ".join(m.text for m in COLLECTED if m.path == path) for path in {m.path for m in COLLECTED}}
    first_words = re.compile(r"raise \w+Error\(\s*(?:f?\"|f?')([^\"'{\\]{15,})")
    found = 0
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        for words in first_words.findall(path.read_text(encoding="utf-8")):
            assert " ".join(words.split()) in listed[str(path.relative_to(ROOT))], path
            found += 1
    assert found > 150


def read(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data: {{datasets: [{{path: {tmp_path}}}]}}\n{text}")
    check_recipe(RECIPES.read([str(tmp_path / "recipe.yaml")]))


@pytest.mark.parametrize(
    "raises",
    [
        lambda _: diff_attn_func(*(torch.zeros(1, 2, 1, 4) for _ in range(5)), 0.1, backend="none"),
        lambda _: GroupedDifferentialAttention(
            8, num_heads=5, num_noise_heads=2, num_kv_heads=2, head_dim=4, layer_idx=0
        ),
        lambda _: MotifConfig(head_dim=7),
        lambda _: Layout(shard=3).resolve(4),
        lambda _: attention_from_unilm({}, num_heads=1, layer_idx=0),
        lambda folder: read(folder, "run: {stepz: 3}"),
        lambda folder: read(folder, "run: {steps: many}"),
        lambda folder: read(folder, "optim: {warmup_steps: 5000}\nrun: {steps: 10}"),
    ],
    ids=["backend", "heads", "config", "layout", "unilm", "unknown field", "wrong type", "rule"],
)
def test_what_a_user_is_told_is_listed(raises: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"\w") as told:
        raises(tmp_path)
    assert any(message.matches(str(told.value)) for message in COLLECTED), told.value


def test_the_page_has_a_place_for_all_of_them() -> None:
    assert "<!-- site: messages -->" in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert as_html(COLLECTED).count("<h4 ") == len(COLLECTED)
