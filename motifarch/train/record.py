"""A run's own record, `run.json`: what was run, on what, from what."""

import dataclasses
import datetime
import json
import platform
import socket
from pathlib import Path
from typing import Any

import torch

from motif_kernels.impl.cpu.row_formulas import VARIABLE, cpu_kernels
from motifarch.environment import git_state, installed_version
from motifarch.errors import UserError
from motifarch.files import sha256, write_json
from motifarch.parallel import World
from motifarch.train.annealing import post_alpha
from motifarch.train.inputs import Inputs
from motifarch.train.learning_rate import about_learning_rate, learning_rate_change
from motifarch.train.manifest import MANIFEST, read_manifest
from motifarch.train.read_recipe import to_dict
from motifarch.train.recipe import ModelSection, Recipe
from motifarch.train.run_folder import RECORD, read_record
from motifarch.train.trained_model import read_about

_PACKAGES = ("motifarch", "torch", "triton", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def about_checkpoint(recipe: Recipe, inputs: Inputs, device: torch.device, compute: str, step: int) -> dict[str, Any]:
    """What a manifest notes of its run after a step: enough to see that a resume continues it."""
    return {
        "seed": recipe.run.seed,
        "samples": inputs.mixture.place(step),
        "batches": _batches(recipe),
        "learning_rate": about_learning_rate(recipe),
        "compute": compute,
        **row_kernels(device),
        **inputs.fingerprints(),
        "model_config": inputs.model_config.to_dict(),
        **_post_alpha(recipe, step),
        "lora": _lora(recipe),
        "init_from": recipe.run.init_from,
    }


def check_parent(parent: Path, recipe: Recipe, inputs: Inputs, device: torch.device) -> list[str]:
    """Warns of what differs between a checkpoint and what is about to continue it, but may.

    Raises:
        UserError: the data, the tokenizer or the model differ.
    """
    about = read_about(parent)
    if "average_of" in about:
        raise UserError(
            f"{parent} is an average and holds weights alone, so no run can resume from it; begin one with "
            f"--run.init_from {parent} and another --run.output"
        )
    now = inputs.fingerprints()
    fresh = "start a new run with --run.output (and --run.init_from to begin with these weights)"
    if about["tokenizer"] != now["tokenizer"]:
        raise UserError(
            f"{inputs.training[0].folder} was prepared with another tokenizer (fingerprint {_short(now['tokenizer'])}) "
            f"than the run that {parent} belongs to ({_short(about['tokenizer'])}); give that run's data, or {fresh}"
        )
    before, after = about["data"], now["data"]
    if [d["fingerprint"] for d in before] != [d["fingerprint"] for d in after]:
        was = ", ".join(f"{d['path']} ({_short(d['fingerprint'])})" for d in before)
        here = ", ".join(f"{d['path']} ({_short(d['fingerprint'])})" for d in after)
        raise UserError(
            f"data.datasets is {here}, but the run that {parent} belongs to read {was}; give the same data, or {fresh}"
        )
    # The manifest holds what JSON makes of the config. How attention is computed may change.
    config = json.loads(json.dumps(inputs.model_config.to_dict()))
    for name in [f.name for f in dataclasses.fields(ModelSection)] + ["rope_parameters"]:
        if name in config and config[name] != about["model_config"].get(name):
            raise UserError(
                f"the model's {name} is {config[name]!r}, but {about['model_config'].get(name)!r} in the checkpoint "
                f"{parent}; use the same model section, or {fresh}"
            )
    before, after = about.get("lora"), _lora(recipe)
    if {**(before or {}), "dropout": None} != {**(after or {}), "dropout": None}:
        raise UserError(
            f"the recipe's lora section is {_shown(after)}, but {_shown(before)} in the checkpoint {parent}; use the "
            f"same one, or {fresh}"
        )
    warnings = _changes(about, recipe, inputs, step=read_manifest(parent)["step"])
    if about["seed"] != recipe.run.seed:
        warnings.append(f"run.seed is {recipe.run.seed}, but was {about['seed']}: samples may repeat within an epoch")
    ran, runs = about.get("cpu_kernels"), row_kernels(device).get("cpu_kernels")
    if ran and runs and ran != runs:
        warnings.append(
            f"PolyNorm, norms and attention's epilogue ran by {ran} before and run by {runs} now: results may differ "
            f"in their last bits from an uninterrupted run's; {VARIABLE}={ran} in the environment goes on as before"
        )
    return warnings


def row_kernels(device: torch.device) -> dict[str, str]:
    """How formulas over rows run, which decides a result's last bits; nothing to say of a GPU.

    Raises:
        UserError: the environment asks for what there is not.
    """
    if device.type != "cpu":
        return {}
    try:
        return {"cpu_kernels": cpu_kernels()}
    except ValueError as error:
        raise UserError(str(error)) from None


def _batches(recipe: Recipe) -> dict[str, Any]:
    """What decides which samples make up the batches, by the recipe's names."""
    batch, data = dataclasses.asdict(recipe.batch), recipe.data
    weights = [[entry.weight, entry.weight_end] for entry in data.datasets]
    return {
        **{f"batch.{name}": value for name, value in batch.items() if name != "micro_size"},
        **{"data.datasets' weights": weights, "data.ramp_start": data.ramp_start, "data.ramp_end": data.ramp_end},
    }


def _changes(about: dict[str, Any], recipe: Recipe, inputs: Inputs, step: int) -> list[str]:
    """What a recipe changes of the batches and the learning rate of the run that it goes on with.

    Checkpoints of earlier versions do not say.
    """
    lines = []
    if "samples" in about and inputs.mixture.go_on(step, about["samples"]):
        before = about["batches"]
        now = {name: value for name, value in _batches(recipe).items() if before.get(name) != value}
        changes = [f"{name} was {before.get(name)}, is {value}" for name, value in now.items()]
        drawn = sum(about["samples"]["drawn"])
        lines.append(f"{'; '.join(changes)}: the data goes on after the {drawn:,} samples that were trained on")
    if "learning_rate" in about and (line := learning_rate_change(about["learning_rate"], recipe, step)):
        lines.append(line)
    was, alpha = about.get("mhc_h_post_alpha"), post_alpha(recipe, step)
    if was is not None and was != alpha:
        lines.append(
            f"hyper-connections' alpha was {was:.3g} after step {step} and is {alpha:.3g} now: "
            f"optim.mhc_post_alpha_steps is {recipe.optim.mhc_post_alpha_steps}"
        )
    return lines


def _post_alpha(recipe: Recipe, step: int) -> dict[str, float]:
    """The alpha of hyper-connections, which may be on its way to the model's config's."""
    return {"mhc_h_post_alpha": post_alpha(recipe, step)} if recipe.model.mhc_enabled else {}


def _lora(recipe: Recipe) -> dict[str, Any] | None:
    """The adapters that a run trains, if it does."""
    return dataclasses.asdict(recipe.lora) if recipe.lora.rank else None


def _shown(lora: dict[str, Any] | None) -> str:
    return "without adapters" if lora is None else str(lora)


def _short(fingerprint: str) -> str:
    return fingerprint[:12]


def write_record(
    recipe: Recipe,
    inputs: Inputs,
    world: World,
    compute: str,
    parent: Path | None,
    *,
    parameters: int,
    ledger_entry: str | None,
) -> None:
    """Writes `run.json`; earlier starts are kept under `starts`. Each names the ledger's entry that
    it goes on from.
    """
    output = Path(recipe.run.output)
    previous = read_record(output)
    origin = parent or recipe.run.init_from
    manifest = Path(origin) / MANIFEST if origin else None
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": read_manifest(parent)["step"] if parent else 0,
        "parent": {
            "checkpoint": str(origin),
            "manifest_sha256": sha256(manifest) if manifest and manifest.is_file() else None,
        }
        if origin
        else None,
        "ledger_entry": ledger_entry,
        "host": socket.gethostname(),
        "ranks": world.size,
        "devices": device_name(world.device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := installed_version(name))},
        "git": git_state(),
    }
    write_json(
        output / RECORD,
        {
            **start,
            "seed": recipe.run.seed,
            "compute": compute,
            "parameters": parameters,
            **row_kernels(world.device),
            **inputs.fingerprints(),
            "recipe": to_dict(recipe),
            "model_config": inputs.model_config.to_dict(),
            "starts": [*previous.get("starts", []), start],
        },
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
