"""Models that transformers cuts over ranks, as each rank sees them: functions that ranks run."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from helpers.models import random_ids

NEW = 6


def run(model: Any) -> dict[str, Any]:
    """Logits, continuations with two caches, and the loss and gradients of a training step."""
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        result: dict[str, Any] = {"logits": model(input_ids=ids, attention_mask=mask).logits}
        for cache in ("dynamic", "static"):
            options = {
                "max_new_tokens": NEW,
                "do_sample": False,
                "cache_implementation": cache,
                "disable_compile": True,
            }
            result[cache] = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return result | {
        "loss": loss.detach(),
        "gradients": {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()},
    }


def load_and_run(folders: list[Path], output: Path) -> None:
    """Loads each folder with transformers' plan; rank 0 saves results and its share."""
    dist.init_process_group("gloo")
    results = {}
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the argument is to become a field of distributed_config
            model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        whole = {n for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        results[folder.name] = run(model) | {"held": held, "whole": whole}
        saved = folder.with_name(f"{folder.name} saved")
        model.save_pretrained(saved)
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.destroy_process_group()
