"""`motifarch grow`: a larger model from a smaller one, computing the same function at the start."""

import argparse
from collections.abc import Sequence
from dataclasses import fields

import torch
from rich.console import Console

from motifarch.command_line import Parser, option, path
from motifarch.errors import UserError
from motifarch.field_types import Fraction, Heads, Layers, Seed
from motifarch.growth.folders import SourceFolder
from motifarch.growth.from_softmax import from_softmax
from motifarch.growth.from_softmax_probe import closest, probe_ids
from motifarch.growth.from_softmax_sources import FAMILIES, as_motif
from motifarch.growth.grow import plan, write
from motifarch.growth.layouts import LAYOUTS, Factors, read_layout
from motifarch.growth.model_spec import ModelSpec, describe
from motifarch.growth.width import Noise
from motifarch.models.motif import MotifConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WITH_TO = ("ratio", "sub_norm", "approximate", "probe")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.growth.grow`; returns the exit status.

    Raises:
        UserError: something does not fit, is missing or is damaged.
    """
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False)
    noise = None if arguments.noise is None else Noise(arguments.noise, arguments.seed)
    source, dtype, factors = SourceFolder(arguments.source), DTYPES.get(arguments.dtype), _factors(arguments)
    if arguments.to is None:
        given = [f"--{n.replace('_', '-')}" for n in _WITH_TO if vars(arguments)[n]]
        if given:
            raise UserError(
                f"{', '.join(given)} works with --to diff_v2 or --to gda only; give that too, or leave it out"
            )
        base, spec = None, plan(source, factors, noise=noise, dtype=dtype)
    elif factors != Factors() or noise is not None:
        raise UserError("--to changes the attention and grows nothing; convert first, then grow the folder it makes")
    else:
        base, spec = _converted(source, arguments, dtype)
    _announce(spec, console)
    check = arguments.check and not (base and spec.steps[-1].loss)  # that loss has been measured
    measured = write(spec, source, arguments.output, check=check, base=base, console=console)
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
    """The source as a Motif model, and the differential model that --to asks for."""
    spec = describe(source, dtype)
    options = {"ratio": arguments.ratio, "sub_norm": arguments.sub_norm, "seed": arguments.seed}
    if arguments.approximate:
        ids = probe_ids(source, arguments.probe, arguments.seed)
        return as_motif(spec), closest(source, spec, arguments.to, ids, **options)
    if arguments.probe is not None:
        raise UserError("--probe is measured on with --approximate only; an exact conversion needs none")
    return as_motif(spec), from_softmax(spec, arguments.to, **options)


def _announce(spec: ModelSpec, console: Console) -> None:
    for step in spec.steps:
        console.print(step.summary, soft_wrap=True)
        if step.loss:
            console.print(f"  not exact: {step.loss}", soft_wrap=True, style="yellow")
    parameters = sum(torch.Size(lazy.shape).numel() for lazy in spec.tensors.values())
    console.print(f"{parameters:,} parameters in {len(spec.tensors):,} tensors", soft_wrap=True)


def _factors(arguments: argparse.Namespace) -> Factors | MotifConfig:
    own = Factors(**{field.name: getattr(arguments, field.name) for field in fields(Factors)})
    if arguments.like is None:
        return own
    if own != Factors():
        raise UserError("--like says how much everything grows; give it, or the factors, but not both")
    return read_layout(arguments.like)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="motifarch grow", description=__doc__)
    parser.add_argument("source", type=path, help="a Motif model's Hugging Face folder; it is only read")
    parser.add_argument("output", type=path, help="the folder to make; it must not exist")
    parser.add_argument(
        "--like", metavar="LAYOUT", help=f"grow into this layout: {', '.join(LAYOUTS)}, or a Motif model's folder"
    )
    for name, multiplied in {
        "--hidden": "the hidden size",
        "--feed-forward": "the intermediate size",
        "--signal-heads": "signal heads; noise and key/value heads stay",
        "--heads": "all heads: signal, noise and key/value",
    }.items():
        parser.add_argument(name, type=option(Heads), default=1, metavar="N", help=f"multiply {multiplied}")
    parser.add_argument(
        "--layers", type=option(Layers), metavar="N", help="layers afterwards; new ones start as the identity"
    )
    parser.add_argument("--untie", action="store_true", help="give a tied output projection a matrix of its own")
    parser.add_argument(
        "--noise",
        type=option(Fraction),
        metavar="X",
        help="make copies differ by noise of X standard deviations that cancels in what they compute, such as 0.01",
    )
    parser.add_argument("--seed", type=option(Seed), default=0, help="of the noise (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the grown weights (default: the source's)")
    group = parser.add_argument_group(
        "from a softmax model",
        f"SOURCE may be a model of {', '.join(FAMILIES)}, or a Motif model with softmax attention",
    )
    group.add_argument(
        "--to", choices=("diff_v2", "gda"), help="make it a differential model that starts as the same function"
    )
    group.add_argument(
        "--ratio",
        type=option(Heads),
        metavar="G",
        help="signal heads for each noise head (default: 1 for diff_v2; for gda as many as share a key/value head)",
    )
    group.add_argument("--sub-norm", action="store_true", help="normalise each head's output; needs --approximate")
    group.add_argument(
        "--approximate", action="store_true", help="allow what cannot start as the same function, and say how far it is"
    )
    group.add_argument(
        "--probe", type=path, metavar="TEXT", help="with --approximate: measure on this text file, not on random tokens"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not run both models to compare their logits"
    )
    return parser
