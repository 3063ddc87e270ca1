"""Model folders that grow: saving, loading, and whether two models compute the same."""

from pathlib import Path
from typing import Any

import torch

from helpers.models import random_ids, tiny_model
from motifarch.growth import Factors, Noise, grow
from motifarch.models.motif import MotifForCausalLM


def saved(folder: Path, variant: str = "gda", *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A folder with a model whose every parameter is away from where initialisation leaves it."""
    model = tiny_model(variant, dtype=torch.float32, **overrides)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, biases, PolyNorm's weights
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype | str = "auto") -> MotifForCausalLM:
    """A folder's model, for which no tensor is missing or unexpected."""
    model, report = MotifForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def grown(
    source: Path, name: str = "grown", *, noise: Noise | None = None, dtype: torch.dtype | None = None, **factors: Any
) -> Path:
    """A grown folder beside the source."""
    output = source.with_name(name)
    grow(source, output, Factors(**factors), noise=noise, dtype=dtype)
    return output


@torch.no_grad()
def largest_difference(one: Path, other: Path, dtype: torch.dtype | str = "auto") -> float:
    """Of the logits of two folders' models, run by transformers."""
    ids = random_ids(2, 19)
    first, second = (loaded(folder, dtype)(input_ids=ids).logits for folder in (one, other))
    assert float(first.std()) > 0.1  # or agreement would mean little
    return float((first.double() - second.double()).abs().max())
