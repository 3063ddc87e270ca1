"""recipes/trainer/train.py on gloo processes: trainer_on_cpu.py RESULT RECIPE ...

On a CPU, accelerate 1.15 quietly falls back to DistributedDataParallel: its state takes FSDP up for
GPUs alone. Here the state is told what it would have found there; all else is accelerate's own.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from motifarch.train.read_recipe import read_recipe

SCRIPT = Path(__file__).parents[2] / "recipes" / "trainer" / "train.py"
init = AcceleratorState.__init__


def with_fsdp(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = fsdp_plugin


def main(result: Path, argv: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("trainer_recipe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    recipe_script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe_script)
    trainer = recipe_script.build_trainer(read_recipe(argv), use_cpu=True, disable_tqdm=True, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # A tensor of one element has no second shard to give away.
    sharded = [
        isinstance(p, DTensor) and (p.shape[0] == 1 or p.to_local().numel() < p.numel())
        for p in trainer.model.parameters()
    ]
    biases = [layer.expert_bias.tolist() for layer in trainer.model.model.expert_layers().values()]
    layers = [isinstance(layer, FSDPModule) for layer in trainer.model.model.layers]
    if not dist.is_initialized() or dist.get_rank() == 0:
        result.write_text(json.dumps({"losses": losses, "sharded": sharded, "layers": layers, "biases": biases}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]
    main(Path(sys.argv[1]), sys.argv[2:])
