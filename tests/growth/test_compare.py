"""Running a folder a layer at a time gives what transformers' model gives."""

import pytest
import torch

from helpers.grown import loaded, saved
from helpers.models import VARIANTS, random_ids
from helpers.motif_3 import tiny_motif_3
from motifarch.growth import SourceFolder
from motifarch.growth.compare import difference, logits

CASES = {variant: (variant, {}) for variant in VARIANTS} | {
    "yarn": ("gda", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "bias": ("gda", {"use_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_the_model_s(tmp_path, case):
    variant, overrides = CASES[case]
    folder, ids = saved(tmp_path, variant, initializer_range=0.1, **overrides), random_ids(2, 19)
    torch.testing.assert_close(
        logits(SourceFolder(folder), ids), loaded(folder)(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@torch.no_grad()
def test_logits_of_motif_3_are_the_model_s(tmp_path):
    model, ids = tiny_motif_3(dtype=torch.float32), random_ids(2, 19, vocab_size=61)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(SourceFolder(tmp_path), ids), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_differences_are_measured(tmp_path):
    one, other = saved(tmp_path / "one", dtype=torch.bfloat16), saved(tmp_path / "other", seed=1)
    layers = []
    assert difference(SourceFolder(one), SourceFolder(one), lambda: layers.append(1)).largest == 0
    assert len(layers) == 4
    found = difference(SourceFolder(one), SourceFolder(other))
    assert found.largest > found.spread > 0.1
    assert found.tokens == 32
