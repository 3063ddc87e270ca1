"""A small recipe to plan, and the same on real ranks: what each allocates in a step."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from motifarch.models.motif import MotifConfig
from motifarch.parallel import Mesh, open_world
from motifarch.train.loop import build_state
from motifarch.train.recipe import DatasetEntry, Recipe
from motifarch.train.step import train_step

SEQ_LEN = 32

FIELDS: dict[str, Any] = {
    "model.vocab_size": 320,
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 12,
    "model.num_noise_heads": 4,
    "model.num_key_value_heads": 8,
    "model.head_dim": 8,
    "model.max_position_embeddings": 1024,
    "model.tie_word_embeddings": False,
    "data.datasets": [DatasetEntry("data/nowhere")],
    "batch.size": 16,
    "batch.micro_size": 2,
    "precision.compute": "float32",
    "run.steps": 1000,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gda": {},
    "gda narrow": {"model.num_key_value_heads": 4, "model.paired_kv": False, "model.sub_norm": False},
    "diff_v1": {"model.attention_type": "diff_v1", "model.num_noise_heads": None, "model.num_key_value_heads": 12},
    "diff_v2": {"model.attention_type": "diff_v2", "model.num_key_value_heads": 4, "model.attention_gate": True},
    "softmax": {
        "model.attention_type": "softmax",
        "model.num_noise_heads": None,
        "model.num_key_value_heads": 4,
        "model.hidden_act": "silu",
    },
}


def small_recipe(variant: str = "gda", **fields: Any) -> Recipe:
    """A recipe with fields of FIELDS, of a variant, and given ones; "__" stands for the dot."""
    given = FIELDS | VARIANTS[variant] | {name.replace("__", "."): value for name, value in fields.items()}
    recipe = Recipe()
    for name, value in given.items():
        section, _, field = name.rpartition(".")
        target = getattr(recipe, section) if section else recipe
        assert field in {f.name for f in dataclasses.fields(target)}
        setattr(target, field, value)
    return recipe


def config_of(recipe: Recipe, attention: str = "auto") -> MotifConfig:
    fields = dataclasses.asdict(recipe.model) | {"attn_implementation": attention}
    return MotifConfig(**{name: value for name, value in fields.items() if name != "vocab_multiple"})


def measure_ranks(output: Path, recipes: dict[str, Recipe]) -> None:
    """Takes a step of each recipe; each rank writes bytes of parameters, gradients, states."""
    with open_world() as world:
        measured = {}
        for name, recipe in recipes.items():
            mesh = Mesh("cpu", recipe.parallel.resolve(world.size))
            state, _ = build_state(recipe, config_of(recipe), world, mesh, seq_len=SEQ_LEN, compute="float32")
            found: dict[str, int] = {}

            def before_step(*_: Any, state: Any = state, found: dict[str, int] = found) -> None:
                found["gradients"] = allocated([p.grad for p in state.model.parameters()])

            state.optimizer.register_step_pre_hook(before_step)
            rows = torch.randint(0, 320, (2, SEQ_LEN))
            batch = {"input_ids": rows, "shift_labels": rows}
            train_step(state, [batch], world=world, targets=256, lr=1e-3, clip=1.0, layout=mesh.layout)
            found["parameters"] = allocated(list(state.model.parameters()))
            found["optimizer"] = allocated([v for s in state.optimizer.state.values() for v in s.values()])
            measured[name] = found
        (output / f"{world.rank}.json").write_text(json.dumps(measured))


def allocated(tensors: list[Any]) -> int:
    """Bytes of storage behind tensors of this rank."""
    locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in locals_)
