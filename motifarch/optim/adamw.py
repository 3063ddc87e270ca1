"""AdamW with decay on matrices alone (Loshchilov and Hutter, arXiv 1711.05101)."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter maps vectors to vectors, or does so for each expert (experts, rows,
    columns): by its published name, for some vectors and scalars are stacked too, PolyNorm's of
    each expert (`act_fn`) and the biases of hyper-connections (`bias_res`).
    """
    *owners, leaf = name.split(".")
    return parameter.ndim >= 2 and owners[-1:] != ["act_fn"] and not leaf.startswith("bias")


def parameter_groups(model: nn.Module, *, weight_decay: float, decay_embeddings: bool = True) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters, sharded or not, by whether they are decayed.

    Vectors and scalars (norms, lambdas, PolyNorm's weights and bias, an expert's too) are never
    decayed; matrices are, `nn.Embedding` weights among them if `decay_embeddings`. A matrix that is
    tied to the embedding counts as the embedding.

    Returns:
        Optimizer groups, none of them empty: decayed first, then not, one for each mesh of shards.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = is_matrix(name, parameter) and (decay_embeddings or id(parameter) not in embeddings)
            # A fused kernel takes DTensors of one mesh only.
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((decayed, mesh), []).append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0}
        for (decayed, _), params in sorted(groups.items(), key=lambda group: not group[0][0])
    ]


def build_adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay_embeddings: bool = True,
) -> torch.optim.AdamW:
    """Returns torch's fused AdamW; see `motifarch.optim.skip_nonfinite` for skipped steps."""
    groups = parameter_groups(model, weight_decay=weight_decay, decay_embeddings=decay_embeddings)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
