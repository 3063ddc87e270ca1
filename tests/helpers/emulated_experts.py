"""Runs whose experts multiply in emulated MXFP8, and troubles in them: functions that ranks run."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.tiny import MOTIF_3
from motifarch.errors import UserError

MODEL: dict[str, Any] = MOTIF_3 | {
    "num_hidden_layers": 4,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "head_dim": 48,
    "qk_rope_head_dim": 32,
    "v_head_dim": 16,
}
"""A Motif-3 whose widths are multiples of 32, with experts in two inner layers and the last."""


def run(folder: Path, args: list[str], troubles: list[str]) -> None:
    """`motifarch train`, which says its status or error at the end.

    Troubles, each "NAME" or "NAME:STEP":

    - "nan in w2": one block of the gradient of an expert's down projection, on rank 1, at a step;
    - "unwritten rows": what comes out of products in rows past the last expert's is NaN;
    - "no guard": steps that are not finite are taken all the same.
    """
    from motifarch.train import loop, step
    from motifarch.train.main import main

    loop.parallelize = partial(loop.parallelize, emulate_matmul=True)
    loop.check_low_precision = lambda *_, **__: None
    for trouble in troubles:
        name, _, at = trouble.partition(":")
        if name == "nan in w2":
            _plant(int(at))
        elif name == "unwritten rows":
            leave_rows_unwritten()
        else:
            step.step_if_finite = _step_always
    with (folder / f"printed_by_{os.environ['RANK']}").open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        try:
            print(f"status {main(args)}", flush=True)
        except UserError as error:
            print(f"error: {error}", flush=True)


def _plant(at: int) -> None:
    from torchao.prototype.moe_training import mxfp8_grouped_mm as torchao

    from motifarch.train import loop

    gradient, train_step, now = torchao._compute_wgrad, loop.train_step, [-1]

    def counted(state: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] = state.step
        return train_step(state, *args, **kwargs)

    def planted(*args: Any) -> torch.Tensor:
        out = gradient(*args)  # (experts, K, N)
        if now[0] == at and os.environ["RANK"] == "1" and out.shape[1:] == (MODEL["moe_intermediate_size"], 32):
            out = out.clone()
            out[3, :, :32] = float("nan")
            now[0] = -1
        return out

    loop.train_step, torchao._compute_wgrad = counted, planted


def leave_rows_unwritten() -> None:
    """Makes torchao's emulation leave there what its kernels may: anything."""
    from torchao.prototype.moe_training import mxfp8_grouped_mm as torchao

    def unwritten(product: Any) -> Any:
        def run(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor, *args: Any) -> torch.Tensor:
            out: torch.Tensor = product(rows, matrices, offsets, *args)
            out = out.clone()
            out[int(offsets[-1]) :] = float("nan")
            return out

        return run

    torchao._compute_fwd, torchao._compute_dgrad = map(unwritten, (torchao._compute_fwd, torchao._compute_dgrad))


def _step_always(optimizer: torch.optim.Optimizer, measured: torch.Tensor, skip: Any = None) -> torch.Tensor:
    optimizer.step()
    return torch.zeros_like(measured[0])
