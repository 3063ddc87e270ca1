"""A step of a small Motif-3 on ranks that share its experts: what each allocates in it."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.memory import live_bytes, mark
from helpers.planned import allocated, config_of, small_recipe
from helpers.tiny import MOTIF_3
from motif_kernels.impl.cpu import hyper_connections, row_blocks, row_formulas
from motifarch.layers import token_exchange
from motifarch.layers.experts import Experts
from motifarch.parallel import Mesh, open_world
from motifarch.plan.memory import replaced
from motifarch.train.loop import build_state
from motifarch.train.recipe import ModelSection, Recipe
from motifarch.train.step import train_step

SEQ_LEN, ROWS, RANKS = 256, 2, 4
"""So many tokens that activations are a hundred times the parameters."""


def recipe(**fields: Any) -> Recipe:
    """Of four ranks, which share experts by two; fields as small_recipe has them."""
    layout = {"parallel__shard": RANKS, "parallel__expert": 2}
    batch = {"batch__size": RANKS * ROWS, "batch__micro_size": ROWS}
    found = small_recipe(**(layout | batch | {"optim__name": "muon"} | fields))
    # Planned with the attention that a CPU runs too, not with a GPU's kernel.
    found.model = ModelSection(**MOTIF_3, vocab_size=320, attn_implementation="sdpa")
    return found


def measure_motif_3(output: Path, cases: dict[str, tuple[Recipe, list[int]]]) -> None:
    """Takes steps of each recipe, whose routers take the experts named, if any; each rank writes
    what it holds, and what the allocator gave out in a step.

    A CPU's operators work on blocks of rows, for whose copies a GPU's kernels have registers, and a
    plan has nothing. Of this small model a block would be a whole tensor.
    """
    for module in (hyper_connections, row_blocks, row_formulas):
        module._BLOCK_ELEMENTS = 1 << 12
    with open_world() as world:
        measured = {name: _measure(world, *case) for name, case in cases.items()}
        (output / f"{world.rank}.json").write_text(json.dumps(measured))


def _patient_wait(message: torch.Tensor) -> torch.Tensor:
    """Leaves gloo's thread time to let go of a message: what that thread frees, the profiler does
    not see.
    """
    time.sleep(0.02)
    return torch.ops._c10d_functional.wait_tensor(message)


def _measure(world: Any, recipe: Recipe, taken: list[int]) -> dict[str, Any]:
    mesh = Mesh("cpu", recipe.parallel.resolve(world.size))
    compute = recipe.precision.compute
    state, _ = build_state(recipe, config_of(recipe, "sdpa"), world, mesh, seq_len=SEQ_LEN, compute=compute)
    model, optimizer = state.model, state.optimizer
    torch.manual_seed(world.rank)
    rows = torch.randint(0, 320, (recipe.batch.size // mesh.layout.data_parallel_size, SEQ_LEN))
    batches = [{"input_ids": part, "shift_labels": part} for part in rows.split(recipe.batch.micro_size)]
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    arrived: list[int] = []
    gradients: dict[str, int] = {}

    def before_optimizer(*_: Any) -> None:
        gradients.update(by_experts((p, p.grad) for p in model.parameters()))

    def by_experts(tensors: Iterable[tuple[nn.Parameter, Any]]) -> dict[str, int]:
        theirs = {id(p) for module in experts for p in module.parameters()}
        pairs = list(tensors)
        return {
            "all": allocated([t for _, t in pairs]),
            "experts": allocated([t for p, t in pairs if id(p) in theirs]),
        }

    def step() -> None:
        arrived.clear()
        train_step(
            state, batches, world=world, targets=recipe.batch.size * SEQ_LEN, lr=1e-3, clip=1.0, layout=mesh.layout
        )

    for block in model.model.expert_layers().values():
        block.expert_bias[taken] = 100.0
    for module in experts:
        module.register_forward_pre_hook(lambda _, arguments: arrived.append(len(arguments[0])))
    model.model.register_forward_hook(lambda *_: mark("forward pass over"))
    optimizer.register_step_pre_hook(before_optimizer)
    step()  # makes the optimizer's state
    with replaced(token_exchange, "_wait", _patient_wait):
        steps = [live_bytes(step) for _ in range(3)]
    live = {name: min(found[name] for found in steps) for name in steps[0]}  # a free that was not seen adds
    routed = recipe.batch.micro_size * SEQ_LEN * MOTIF_3["experts_top_k"]
    return {
        "parameters": by_experts((p, p) for p in model.parameters()),
        "gradients": gradients,
        "optimizer": by_experts((p, v) for p, values in optimizer.state.items() for v in values.values()),
        "load": sum(arrived) / len(arrived) / routed,
        **live,
    }
