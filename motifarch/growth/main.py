"""What `motifarch grow` does with its options."""

import argparse
from dataclasses import fields
from typing import Any

import torch
from rich.console import Console

from motifarch.errors import UserError
from motifarch.growth.experts import Experts
from motifarch.growth.folders import SourceFolder
from motifarch.growth.from_softmax import from_softmax
from motifarch.growth.from_softmax_probe import closest, probe_ids
from motifarch.growth.from_softmax_sources import as_compared
from motifarch.growth.grow import plan, write
from motifarch.growth.layouts import Factors, read_layout
from motifarch.growth.model_spec import ModelSpec, describe
from motifarch.growth.vocabulary import Vocabulary
from motifarch.growth.width import Noise
from motifarch.models.motif import MotifConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WITH_TO = ("ratio", "sub_norm", "approximate", "probe")
# Options that are fields of Experts, in other words.
_EXPERTS = {"experts": "num_experts", "shared_experts": "shared", "expert_noise": "noise"} | {
    name: name for name in ("top_k", "granularity", "dense_first", "every", "route_scale")
}


def run(arguments: argparse.Namespace) -> int:
    """Does what the options of ``motifarch grow`` say; returns the exit status.

    Raises:
        UserError: something does not fit, is missing or is damaged.
    """
    console = Console(stderr=True, highlight=False)
    noise = None if arguments.noise is None else Noise(arguments.noise, arguments.seed)
    source, dtype, factors = SourceFolder(arguments.source), DTYPES.get(arguments.dtype), _factors(arguments)
    experts = _experts(arguments)
    vocabulary = None
    if arguments.tokenizer is not None:
        vocabulary = Vocabulary(arguments.tokenizer, arguments.random_rows, arguments.seed)
    elif arguments.random_rows:
        raise UserError("--random-rows are those of new tokens: give a --tokenizer too, or leave it out")
    if arguments.to is None:
        given = [f"--{n.replace('_', '-')}" for n in _WITH_TO if vars(arguments)[n]]
        if given:
            raise UserError(
                f"{', '.join(given)} works with --to diff_v2, gda or gdla only; give that too, or leave it out"
            )
        more: dict[str, Any] = {"experts": experts, "streams": arguments.streams, "vocabulary": vocabulary}
        base, spec = None, plan(source, factors, noise=noise, dtype=dtype, **more)
    elif factors != Factors() or any(given is not None for given in (noise, experts, arguments.streams, vocabulary)):
        raise UserError("--to changes the attention and grows nothing; convert first, then grow the folder it makes")
    else:
        base, spec = _converted(source, arguments, dtype)
    _announce(spec, console)
    check = arguments.check and not (arguments.approximate and spec.steps[-1].loss)  # that has been measured
    measured = write(spec, source, arguments.output, vocabulary=vocabulary, check=check, base=base, console=console)
    if measured is not None:
        console.print(
            f"logits of both models differ by at most {measured.largest:.1e} on {measured.tokens} random tokens "
            f"(their standard deviation is {measured.spread:.2g})",
            soft_wrap=True,
        )
    print(f"grown to {arguments.output}")
    return 0


def _converted(
    source: SourceFolder, arguments: argparse.Namespace, dtype: torch.dtype | None
) -> tuple[ModelSpec, ModelSpec]:
    """What the source is compared as, and the differential model that --to asks for."""
    spec = describe(source, dtype)
    options = {"ratio": arguments.ratio, "sub_norm": arguments.sub_norm, "seed": arguments.seed}
    if arguments.approximate:
        ids = probe_ids(source, arguments.probe, arguments.seed)
        return as_compared(spec), closest(source, spec, arguments.to, ids, **options)
    if arguments.probe is not None:
        raise UserError("--probe is measured on with --approximate only; an exact conversion needs none")
    return as_compared(spec), from_softmax(spec, arguments.to, **options)


def _announce(spec: ModelSpec, console: Console) -> None:
    for step in spec.steps:
        console.print(step.summary, soft_wrap=True)
        if step.loss:
            console.print(f"  not exact: {step.loss}", soft_wrap=True, style="yellow")
    parameters = sum(torch.Size(lazy.shape).numel() for lazy in spec.tensors.values())
    console.print(f"{parameters:,} parameters in {len(spec.tensors):,} tensors", soft_wrap=True)


def _experts(arguments: argparse.Namespace) -> Experts | None:
    given = {field: getattr(arguments, name) for name, field in _EXPERTS.items()}
    given = {field: value for field, value in given.items() if value is not None}
    missing = [f"--{name}" for name, field in (("experts", "num_experts"), ("top-k", "top_k")) if field not in given]
    if given and missing:
        raise UserError(f"experts need {' and '.join(missing)} too; give it, or leave their options out")
    return Experts(**given, seed=arguments.seed) if given else None


def _factors(arguments: argparse.Namespace) -> Factors | MotifConfig:
    own = Factors(**{field.name: getattr(arguments, field.name) for field in fields(Factors)})
    if arguments.like is None:
        return own
    if own != Factors():
        raise UserError("--like says how much everything grows; give it, or the factors, but not both")
    return read_layout(arguments.like)
