"""Hyper-connections start as the residual stream that they replace."""

from pathlib import Path

import pytest
import torch

from helpers.grown import loaded, saved
from helpers.models import random_ids
from motifarch.errors import UserError
from motifarch.growth import Factors, SourceFolder, add_hyper_connections, describe, grow


@pytest.mark.parametrize(
    ("variant", "streams"),
    [("gda 4:1", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("softmax", 2), ("diff_v2", 3)))],
)
def test_streams_start_as_the_same_function(tmp_path: Path, variant: str, streams: int) -> None:
    """Exactly: in float64 to 1e-12."""
    source = saved(tmp_path / "source", variant, dtype=torch.float64, initializer_range=0.1)
    grow(source, tmp_path / "grown", Factors(), streams=streams)
    before, after = loaded(source, torch.float64), loaded(tmp_path / "grown", torch.float64)
    ids = random_ids(2, 19)
    with torch.no_grad():
        expected = before(input_ids=ids).logits
        torch.testing.assert_close(after(input_ids=ids).logits, expected, rtol=0, atol=1e-12)
    config = after.config
    assert (config.mhc_enabled, config.mhc_expansion_rate, config.mhc_h_post_alpha_end) == (True, streams, 1.0)
    after.train()(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in after.named_parameters():
        if ".mhc_" in name and ("alpha_post" in name or "bias_post" in name):
            assert parameter.grad is not None
            assert parameter.grad.any(), name


def test_what_has_no_place_for_streams_is_refused(tmp_path: Path) -> None:
    spec = describe(SourceFolder(saved(tmp_path)))
    with pytest.raises(UserError, match=r"--streams is 1; .* two streams or more"):
        add_hyper_connections(spec, 1)
    with pytest.raises(UserError, match="has hyper-connections already"):
        add_hyper_connections(add_hyper_connections(spec), 4)
