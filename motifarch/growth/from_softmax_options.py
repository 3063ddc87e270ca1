"""`motifarch grow --to`: the command line's options for softmax models."""

import argparse
from pathlib import Path

import torch

from motifarch.errors import UserError
from motifarch.growth.folders import SourceFolder
from motifarch.growth.from_softmax import from_softmax
from motifarch.growth.from_softmax_probe import closest, probe_ids
from motifarch.growth.from_softmax_sources import FAMILIES, as_motif
from motifarch.growth.model_spec import ModelSpec, describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser."""
    group = parser.add_argument_group(
        "from a softmax model",
        f"SOURCE may be a model of {', '.join(FAMILIES)}, or a Motif model with softmax attention",
    )
    group.add_argument(
        "--to", choices=("diff_v2", "gda"), help="make it a differential model that starts as the same function"
    )
    group.add_argument(
        "--ratio",
        type=int,
        metavar="G",
        help="signal heads for each noise head (default: 1 for diff_v2; for gda as many as share a key/value head)",
    )
    group.add_argument("--sub-norm", action="store_true", help="normalise each head's output; needs --approximate")
    group.add_argument(
        "--approximate", action="store_true", help="allow what cannot start as the same function, and say how far it is"
    )
    group.add_argument(
        "--probe", type=Path, metavar="TEXT", help="with --approximate: measure on this text file, not on random tokens"
    )


def refuse_without_to(arguments: argparse.Namespace) -> None:
    """Raises a UserError that names the other options where --to is not given."""
    given = [f"--{n.replace('_', '-')}" for n in ("ratio", "sub_norm", "approximate", "probe") if vars(arguments)[n]]
    if given:
        raise UserError(f"{', '.join(given)} works with --to diff_v2 or --to gda only; give that too, or leave it out")


def convert(
    source: SourceFolder, arguments: argparse.Namespace, dtype: torch.dtype | None
) -> tuple[ModelSpec, ModelSpec]:
    """What the options ask for: the source as a Motif model, and the differential model.

    A ``dtype`` of None keeps the source's.

    Raises:
        UserError: something does not fit; the message names it and the fix.
    """
    spec = describe(source, dtype)
    options = {"ratio": arguments.ratio, "sub_norm": arguments.sub_norm, "seed": arguments.seed}
    if not arguments.approximate:
        if arguments.probe is not None:
            raise UserError("--probe is measured on with --approximate only; an exact conversion needs none")
        return as_motif(spec), from_softmax(spec, arguments.to, **options)
    ids = probe_ids(source, arguments.probe, arguments.seed)
    return as_motif(spec), closest(source, spec, arguments.to, ids, **options)
