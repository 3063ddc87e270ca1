"""Muon for matrices and AdamW for everything else, as one optimizer.

Muon's update is the momentum with its singular values brought to 1 (Jordan et al., 2024). It is
scaled by 0.2 sqrt(max(rows, columns)), which gives it the root mean square that AdamW's updates
have: one learning rate and one weight decay serve both (Liu et al., Muon is Scalable, arXiv
2502.16982).
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from motif_kernels.checks import may_read
from motifarch.optim.newton_schulz import NS_COEFFICIENTS, Coefficients, newton_schulz
from motifarch.optim.parallel_muon import ShardGroup, split_shard_groups
from motifarch.shards import to_local


class Muon(torch.optim.Optimizer):
    """Groups with `muon: True` hold matrices and take Muon's steps; the others take AdamW's.

    Each matrix is orthogonalised as a whole, also where it is a stack of heads' projections (the
    query heads of signal and noise are one matrix). Sharded matrices go through Parallel Muon: see
    `motifarch.optim.parallel_muon`; every rank must then have gradients for the same ones.

    A parameter (experts, rows, columns) is a matrix for each expert, orthogonalised and scaled by
    itself: an expert's gate and up projections, where they are rows of one tensor, are one matrix.
    Ranks share such a parameter by its experts, however unevenly, and each updates those that it
    holds: nothing is sent.

    A group's learning rate is `lr * lr_ratio`, so a schedule may set one `lr` everywhere. State,
    all made at once so that a checkpoint never needs a step to make it: `momentum_buffer`, or
    AdamW's `step`, `exp_avg`, `exp_avg_sq`.

    Where the attribute `found_inf` (a scalar tensor on the device) is not 0, a step leaves
    parameters and state bitwise as they were, and nobody waits for the device to know: see
    `motifarch.optim.step_if_finite`.

    Args:
        params: parameters, or groups of them. What follows can be set in each group.
        lr: learning rate.
        lr_ratio: multiplies it.
        muon: Muon's step, else AdamW's.
        weight_decay: decoupled: parameters shrink by `lr * lr_ratio * weight_decay` a step.
        momentum: Muon's decay rate of the mean gradient.
        nesterov: step along the mean that the next gradient would find, if it were this one.
        ns_coefficients: Newton-Schulz's quintics.
        ns_dtype: what it computes in and ranks send. float32 is for comparisons: bfloat16's
            rounding differs with the order of sums.
        chunk_bytes: bytes of whole matrices that a rank gathers, or takes of its experts, at once.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.

    Raises:
        ValueError: a value out of its range, or a parameter in a Muon group that is neither a
            matrix nor one for each expert, with whole matrices on each rank.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        lr_ratio: float = 1.0,
        muon: bool = True,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = NS_COEFFICIENTS["polar_express"],
        ns_dtype: torch.dtype = torch.bfloat16,
        chunk_bytes: int = 128 << 20,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_ratio": lr_ratio,
            "muon": muon,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "chunk_bytes": chunk_bytes,
            "betas": betas,
            "eps": eps,
            # What torch's optimizers call it when a step can be skipped on the device.
            "fused": True,
        }
        self._shard_groups: dict[tuple[Any, ...], list[tuple[list[nn.Parameter], ShardGroup]]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was pickled; the exchange of matrices is planned anew."""
        super().__setstate__(state)
        self._shard_groups = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checks it and makes its state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        for parameter in group["params"]:
            if group["muon"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                self.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and may_read(found_inf) and not found_inf:
            found_inf = None  # nothing to choose between, and so no copies to choose from
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["muon"]:
                self._muon(group, parameters, None if found_inf is None else found_inf != 0)
            else:
                self._adamw(group, parameters, found_inf)
        return loss

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter], found_inf: torch.Tensor | None) -> None:
        """AdamW on the shards themselves, so one kernel takes DTensors of any meshes."""
        states = [self.state[p] for p in parameters]
        adamw(
            [to_local(p) for p in parameters],
            [_local_gradient(p) for p in parameters],
            [to_local(state["exp_avg"]) for state in states],
            [to_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] * group["lr_ratio"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter], skip: torch.Tensor | None) -> None:
        orthogonalize = partial(newton_schulz, coefficients=group["ns_coefficients"], dtype=group["ns_dtype"])
        for matrices, exchange in self._groups_of(group, [p for p in parameters if p.ndim == 2]):
            exchange.run(
                partial(self._read, group, matrices, skip), orthogonalize, partial(_write, group, matrices, skip)
            )  # fmt: skip
        for experts in (p for p in parameters if p.ndim == 3):
            shard = to_local(experts)
            if not shard.numel():
                continue
            count = max(1, group["chunk_bytes"] // (shard[0].numel() * group["ns_dtype"].itemsize))
            tensors = (shard, _local_gradient(experts), to_local(self.state[experts]["momentum_buffer"]))
            for some, gradient, momentum in zip(*(t.split(count) for t in tensors), strict=True):
                _move(group, some, orthogonalize(_look_ahead(group, gradient, momentum, skip)), experts.shape, skip)

    def _groups_of(
        self, group: dict[str, Any], parameters: list[nn.Parameter]
    ) -> list[tuple[list[nn.Parameter], ShardGroup]]:
        """How these parameters are exchanged; kept, because it may cost a process group."""
        key = (group["ns_dtype"], group["chunk_bytes"], *map(id, parameters))
        if key not in self._shard_groups:
            self._shard_groups[key] = [
                (matrices, ShardGroup(matrices, dtype=group["ns_dtype"], chunk_bytes=group["chunk_bytes"]))
                for numbers in split_shard_groups(parameters)
                for matrices in [[parameters[i] for i in numbers]]
            ]
        return self._shard_groups[key]

    def _read(
        self, group: dict[str, Any], matrices: list[nn.Parameter], skip: torch.Tensor | None, numbers: list[int]
    ) -> list[torch.Tensor]:
        """Takes gradients into the momenta; returns the shards of what is to be orthogonalised."""
        chosen = [matrices[number] for number in numbers]
        momenta = [to_local(self.state[matrix]["momentum_buffer"]) for matrix in chosen]
        return [_look_ahead(group, _local_gradient(m), kept, skip) for m, kept in zip(chosen, momenta, strict=True)]


def _look_ahead(
    group: dict[str, Any], gradient: torch.Tensor, kept: torch.Tensor, skip: torch.Tensor | None
) -> torch.Tensor:
    """Takes a gradient into its momentum; returns what is to be orthogonalised."""
    if skip is None:
        kept.lerp_(gradient, 1 - group["momentum"])
    else:
        kept.copy_(torch.where(skip, kept, torch.lerp(kept, gradient, 1 - group["momentum"])))
    ahead = gradient.lerp(kept, group["momentum"]) if group["nesterov"] else kept
    return ahead.to(group["ns_dtype"])


def _write(
    group: dict[str, Any],
    matrices: list[nn.Parameter],
    skip: torch.Tensor | None,
    numbers: list[int],
    updates: list[torch.Tensor],
) -> None:
    """Moves the matrices' shards along their updates."""
    for matrix, update in zip((matrices[number] for number in numbers), updates, strict=True):
        _move(group, to_local(matrix), update, matrix.shape, skip)


def _move(
    group: dict[str, Any], shard: torch.Tensor, update: torch.Tensor, whole: torch.Size, skip: torch.Tensor | None
) -> None:
    """Decays a shard of matrices of a whole shape (..., rows, columns) and adds its update."""
    lr = group["lr"] * group["lr_ratio"]
    moved = shard if skip is None else shard.clone()
    moved.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * 0.2 * math.sqrt(max(whole[-2:])))
    if skip is not None:
        shard.copy_(torch.where(skip, shard, moved))


def _local_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient's shard that belongs to the parameter's, in its dtype."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        if gradient.placements != parameter.placements:  # a partial sum, for example
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
        gradient = gradient.to_local()
    return gradient.to(parameter.dtype)


def _check(group: dict[str, Any]) -> None:
    if isinstance(group["lr"], torch.Tensor):
        raise ValueError("lr is a tensor; this optimizer takes a number, which a schedule may set anew each step")
    for name, (lowest, below) in {
        "lr": (0.0, math.inf),
        "lr_ratio": (0.0, math.inf),
        "weight_decay": (0.0, math.inf),
        "momentum": (0.0, 1.0),
        "eps": (0.0, math.inf),
        "chunk_bytes": (1, math.inf),
    }.items():
        if not lowest <= group[name] < below:
            raise ValueError(f"{name} is {group[name]}; it must be at least {lowest} and below {below}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas is {group['betas']}; each must be at least 0 and below 1")
    if not all(len(triple) == 3 for triple in group["ns_coefficients"]):
        raise ValueError(f"ns_coefficients is {group['ns_coefficients']}; give a triple (a, b, c) for each step")
    for parameter in group["params"] if group["muon"] else ():
        if parameter.ndim not in (2, 3):
            raise ValueError(
                f"a Muon group has a parameter of the shape {tuple(parameter.shape)}; it takes matrices only, or "
                "(experts, rows, columns), so put others into a group with muon=False"
            )
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        # A partial sum has no dimension either, and no whole matrix.
        if parameter.ndim == 3 and not all(p.is_replicate() or getattr(p, "dim", None) == 0 for p in placements):
            raise ValueError(
                f"a Muon group has experts' matrices of the shape {tuple(parameter.shape)} placed as {placements}, "
                "which cuts the matrices; shard the first dimension alone, as fully_shard does by default, or put "
                "them into a group with muon=False"
            )
