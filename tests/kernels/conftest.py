"""The implementations that every operator test runs through."""

import importlib
from typing import NamedTuple

import pytest
import torch

from helpers.interpreter import reduce_by_halves, require_interpreter
from motif_kernels import ops


class Path(NamedTuple):
    """One implementation of the operators and where its tensors live."""

    name: str
    device: str

    def require(self, dtype: torch.dtype) -> None:
        """Skip the test where this implementation cannot be tested in that precision."""
        if self.name == "interpreter" and dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter is wrong in bfloat16")


@pytest.fixture(params=["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The CPU operators; the Triton kernels, interpreted; the Triton kernels on a GPU."""
    if request.param == "interpreter":
        require_interpreter()
        reduce_by_halves(monkeypatch)
        for family in ("poly_norm", "grouped_poly_norm", "combine", "hyper_connections", "routing", "expert_rows"):
            module = importlib.import_module(f"motif_kernels.ops.{family}")
            monkeypatch.setattr(
                module,
                "implementation",
                lambda family, device: importlib.import_module(f"motif_kernels.impl.triton.{family}"),
            )
    assert ops.has_implementation(torch.device("cpu"))
    return Path(request.param, "cuda" if request.param == "cuda" else "cpu")
