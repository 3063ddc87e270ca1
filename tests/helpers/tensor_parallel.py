"""Motif-3 cut over ranks of tensor parallelism, whole and with one sum over the ranks left out:
functions that ranks run.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from helpers.models import random_ids
from helpers.motif_3 import TINY, trained_motif_3
from motifarch.decoder_layers import decoder_layers
from motifarch.layers import grouped_differential_latent_attention as latent
from motifarch.models.motif import MotifForCausalLM
from motifarch.parallel.tensor import apply_tensor_parallel

OMISSIONS: dict[str, tuple[str, ...]] = {
    "the sum of heads' outputs": ("self_attn.wo",),
    "the sum of the feed-forward's columns": ("mlp.down_proj",),
    "the sum of the shared expert's columns": ("moe.shared_experts.down_proj",),
    "the sum of embedded words": ("embed_tokens",),
    "the queries' latent": ("self_attn.q_norm",),
    "the keys' latent": ("self_attn.wkv_b",),
    "the keys' rotated part": (),
    "lambda": (),
    "the feed-forward's input": ("mlp",),
    "the shared expert's input": ("moe.shared_experts",),
    "the head's input": ("lm_head",),
    "the feed-forward's moments": ("mlp.act_fn",),
    "the shared expert's moments": ("moe.shared_experts.act_fn",),
}
"""What is not summed over the ranks, forward or backward, and in which modules."""


def compare(output: Path) -> None:
    """The largest difference of loss and gradients to one process's, for each omission and, under
    "nothing", without one; rank 0 saves them.
    """
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = _step(trained_motif_3())
    differences = {}
    for name in ("nothing", *OMISSIONS):
        model = trained_motif_3()
        apply_tensor_parallel(model, mesh)
        with _without(name, model, mesh):
            found = _step(model)
        assert found.keys() == expected.keys()
        differences[name] = {key: float((found[key] - value).abs().max()) for key, value in expected.items()}
    if dist.get_rank() == 0:
        torch.save(differences, output)
    dist.destroy_process_group()


def _step(model: MotifForCausalLM) -> dict[str, Tensor]:
    ids = random_ids(2, 12, vocab_size=TINY["vocab_size"])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items() if g is not None}
    return {"loss": loss.detach()} | whole


@contextmanager
def _without(name: str, model: MotifForCausalLM, mesh: DeviceMesh) -> Iterator[None]:
    with ExitStack() as stack:
        if name in ("the keys' rotated part", "lambda"):
            rotated, of_both = name != "lambda", latent.sum_gradient

            def sum_gradient(x: Tensor, group: Any) -> Tensor:
                return x if (x.shape[-1] == TINY["qk_rope_head_dim"]) == rotated else of_both(x, group)

            stack.enter_context(mock.patch.object(latent, "sum_gradient", sum_gradient))
        for module in _modules(model, OMISSIONS.get(name, ())):
            _leave_out(module, name, mesh)
        yield


def _modules(model: MotifForCausalLM, suffixes: tuple[str, ...]) -> list[nn.Module]:
    owners = {"embed_tokens": [model.model], "lm_head": [model]}
    return [
        module
        for suffix in suffixes
        for owner in owners.get(suffix, decoder_layers(model))
        for name, module in owner.named_modules()
        if name == suffix and module is not None
    ]


def _leave_out(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    def unsummed(x: Tensor) -> DTensor:
        """Whole on each rank, with a gradient that stays this rank's part."""
        return DTensor.from_local(x, mesh, (Replicate(),), grad_placements=(Partial(),))

    def parts_as_whole(_: nn.Module, __: Any, out: DTensor) -> DTensor:
        return DTensor.from_local(out.to_local(), mesh, (Replicate(),))

    if "moments" in name:
        module.group = None  # type: ignore[assignment]
    elif "sum of" in name:
        module.register_forward_hook(parts_as_whole, prepend=True)
    elif "queries' latent" in name:
        module.register_forward_hook(lambda _, __, out: unsummed(out), prepend=True)
    else:
        module.register_forward_pre_hook(lambda _, inputs: (unsummed(inputs[0]), *inputs[1:]), prepend=True)
