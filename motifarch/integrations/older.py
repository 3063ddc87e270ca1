"""Folders of patched models as version 0.1.0 saved them, under today's names."""

from pathlib import Path

import torch
from torch import Tensor

from motifarch.weight_files import WeightFiles, file_names

_NOISE_ROWS, _NOISE_NORM = ".q_proj.noise.", ".q_norm.noise."
_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def read_older(folder: Path) -> dict[str, Tensor] | None:
    """The tensors of a patched model whose noise queries were a projection of their own, and whose
    lambda was the attention module's; None where the folder is of today.
    """
    if not any((folder / file).is_file() for file in file_names()):
        return None
    files = WeightFiles(folder)
    if not any(_NOISE_ROWS in name for name in files.names):
        return None
    noise_norms = {name.replace(_NOISE_NORM, ".q_norm.") for name in files.names if _NOISE_NORM in name}
    result: dict[str, Tensor] = {}
    for name in files.names:
        if _NOISE_ROWS in name:
            continue
        tensor, module, _, last = files.read(name), *name.rpartition(".")
        rows = f"{module}.noise.{last}"
        if module.endswith(".q_proj") and rows in files.names:
            tensor = torch.cat((tensor, files.read(rows)))
        if name in noise_norms:
            name = f"{module}.signal.{last}"
        elif last in _LAMBDAS:
            name = f"{module}.lambda_vectors.{last}"
        result[name] = tensor
    return result
