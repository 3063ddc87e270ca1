"""Agreement with an independent implementation."""

import torch
from torch import Tensor


def assert_agrees(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    """Agree to ``tolerance`` of the largest value or of 1; tiny values prove nothing, and fail."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    size = theirs.detach().abs().max().item()
    assert size > 100 * tolerance, f"{name}: nothing to compare, the largest value is {size:.3e}"
    error = (ours.detach() - theirs.detach()).abs().max().item()
    assert error <= tolerance * max(size, 1), f"{name}: differs by {error:.3e}, the largest value is {size:.3e}"


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Overwrites every parameter with random numbers (norm weights around 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            centre = 1.0 if "norm" in name or "subln" in name else 0.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std + centre)
