"""The optimizer that a recipe names, over a model's parameters."""

from typing import Any, Literal

import torch
from torch import nn

from motifarch.optim.adamw import build_adamw, is_matrix, parameter_groups
from motifarch.optim.muon import Muon
from motifarch.optim.newton_schulz import NS_COEFFICIENTS


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices inside `model.model.layers` and, where there are any, `mtp_layers`
    (multi-token prediction), in the model's order: what Muon is for.

    Experts' matrices (experts, rows, columns) are among them, and so are routers and the
    projections of hyper-connections, though these have few rows: each is a linear map inside the
    network, whose update gets the size of AdamW's whatever its shape, and DeepSeek-V4 (2026,
    section 2.4) trains both so; the biases and factors of hyper-connections it leaves to AdamW.

    Embedding and output projection are left out, for their rows are words, each with a gradient of
    its own scale (Jordan et al., 2024); so is `lambda_proj`, which gives every head one number and
    is a lambda.
    """
    decoder: Any = model.model
    stacks = (decoder.layers, getattr(decoder, "mtp_layers", None))
    named = (parameter for stack in stacks if stack is not None for parameter in stack.named_parameters())
    return [p for name, p in named if p.requires_grad and is_matrix(name, p) and "lambda" not in name]


def build_muon(
    model: nn.Module,
    *,
    lr: float,
    muon_lr_ratio: float = 1.0,
    weight_decay: float = 0.1,
    decay_embeddings: bool = True,
    **options: Any,
) -> Muon:
    """Returns Muon for a model's hidden matrices and AdamW for its other parameters, as one
    optimizer.

    The model has `model.model.layers`, sharded or not. `muon_lr_ratio` multiplies the learning rate
    for the hidden matrices; matrices decay (decoupled), embeddings among them if
    `decay_embeddings`, vectors and scalars never; other options are `Muon`'s.

    Raises:
        ValueError: a value out of its range.
    """
    matrices = {id(p) for p in hidden_matrices(model)}
    groups: list[dict[str, Any]] = []
    hidden: list[nn.Parameter] = []
    for group in parameter_groups(model, weight_decay=weight_decay, decay_embeddings=decay_embeddings):
        hidden += [p for p in group["params"] if id(p) in matrices]
        others = [p for p in group["params"] if id(p) not in matrices]
        if others:
            groups.append(group | {"params": others, "muon": False})
    muon = {"muon": True, "lr_ratio": muon_lr_ratio, "weight_decay": weight_decay}
    # Experts' matrices apart: ranks exchange none of them, so they can be taken piece by piece.
    kinds = [[p for p in hidden if p.ndim == dimensions] for dimensions in (2, 3)]
    return Muon([{"params": params, **muon} for params in kinds if params] + groups, lr, **options)


def build_optimizer(
    model: nn.Module,
    *,
    name: Literal["adamw", "muon"],
    momentum: float = 0.95,
    muon_lr_ratio: float = 1.0,
    ns_coefficients: str = "polar_express",
    ns_dtype: torch.dtype = torch.bfloat16,
    muon_chunk_mib: int = 128,
    **common: Any,
) -> torch.optim.Optimizer:
    """Returns an optimizer that can skip a step on the device (`motifarch.optim.skip_nonfinite`).

    Both take the options of `build_adamw`: lr, betas, eps, weight_decay, decay_embeddings. "muon"
    is `build_muon`'s, for hidden matrices with AdamW for the rest; its Newton-Schulz steps are
    named in `NS_COEFFICIENTS`, compute in `ns_dtype`, and gather `muon_chunk_mib` MiB of whole
    matrices on a rank at once.

    Raises:
        ValueError: an unknown name, or a value out of its range.
    """
    if name == "adamw":
        return build_adamw(model, **common)
    if name != "muon":
        raise ValueError(f"unknown optimizer {name!r}; accepted are adamw and muon")
    if ns_coefficients not in NS_COEFFICIENTS:
        raise ValueError(f"unknown ns_coefficients {ns_coefficients!r}; accepted are {', '.join(NS_COEFFICIENTS)}")
    return build_muon(
        model,
        **common,
        muon_lr_ratio=muon_lr_ratio,
        momentum=momentum,
        ns_coefficients=NS_COEFFICIENTS[ns_coefficients],
        ns_dtype=ns_dtype,
        chunk_bytes=muon_chunk_mib << 20,
    )
