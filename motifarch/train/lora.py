"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685) in a model's linear layers, by peft.

Sharding, optimizer, steps and checkpoints know nothing of them: a weight that is not trained just
has no gradient.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.shards import local_shard, to_local
from motifarch.train.recipe import LoraSection

_ADAPTER = "default"
"""peft's name of a model's only adapter."""


def add_adapters(model: MotifForCausalLM, lora: LoraSection) -> None:
    """Puts adapters beside the linear layers that a recipe names, and freezes all else, in place.

    They lie on the default device, without first weights (see `init_adapters`).

    Raises:
        UserError: peft is missing, or the model's decoder layers have no linear layer of a name.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(
            f"lora.rank is {lora.rank}, which needs peft, and none is installed; run pip install 'motifarch[peft]', "
            "or set lora.rank to 0 to train all weights"
        ) from None
    linears = [name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linears})
    if unknown := sorted(set(lora.targets) - set(names)):
        raise UserError(f"lora.targets names {unknown[0]}, but the model's linear layers are {', '.join(names)}")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(set(lora.targets)),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model.add_adapter(config)


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Gives a model's adapters, sharded or not, peft's first weights: B is 0, so nothing changes.

    They are drawn from the seed and their names, the same for every number of ranks.
    """
    for name, layer in _adapted(model):
        down, up = (getattr(layer, part)[_ADAPTER].weight for part in ("lora_A", "lora_B"))
        digest = hashlib.sha256(f"{seed} {name} adapter".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.empty(down.shape, dtype=down.dtype)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        to_local(down).copy_(local_shard(whole, down))
        to_local(up).zero_()


def merge_adapters(model: MotifForCausalLM) -> None:
    """Adds the adapters' products to the weights and takes the adapters out, in place."""
    for name, layer in list(_adapted(model)):
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    model.requires_grad_(True)


def base_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """Of a model's state dictionary what it has without adapters, by the names it has then."""
    return {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, found without importing peft for a model that has none."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
