"""`motifarch plan`: what a recipe needs on a cluster, found on one CPU."""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import Field
from rich.console import Console

from motifarch.command_line import Parser, loading, option, path
from motifarch.errors import UserError
from motifarch.field_types import FilePath, Length, Multiplier, Ranks
from motifarch.files import atomic_write, write_json
from motifarch.hardware import GPUS, find_gpu
from motifarch.plan.assumptions import ASSUMPTIONS, Assumptions
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import Recipe

if TYPE_CHECKING:
    from motifarch.plan.planning import Plan

_TOKENS = Annotated[float, Field(ge=1, le=1e18)]


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the plan's own options; all others are the recipe's fields."""
    parser = Parser(
        prog="motifarch plan",
        usage="%(prog)s RECIPE.yaml --gpus N --gpu NAME [options] [--section.field VALUE ...]",
        description="Say what a recipe needs on a number of GPUs: memory, traffic, FLOPs, time. Needs no GPU.",
        examples=[
            "motifarch plan motif_2.6b/b200_64 --gpus 64 --gpu b200 --seq-len 4096",
            "motifarch plan my.yaml --gpus 8 --gpu h100 --output plan --batch.micro_size 2",
        ],
    )
    parser.add_argument("recipe", type=option(FilePath), metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument("--gpus", type=option(Ranks), required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"their kind: {', '.join(GPUS)}")
    parser.add_argument(
        "--domain", type=option(Ranks), metavar="N", help="GPUs in an NVLink domain (default: the machine's, 8 or 72)"
    )
    parser.add_argument(
        "--network-gbit", type=option(Multiplier), metavar="X", help="network a GPU, Gbit/s (default: 400)"
    )
    parser.add_argument(
        "--seq-len",
        type=option(Length),
        metavar="N",
        help="tokens of a sequence (default: as the recipe's data was prepared)",
    )
    parser.add_argument(
        "--tokens",
        type=option(_TOKENS),
        metavar="X",
        help="tokens of the run, such as 5.5e12 (default: the recipe's steps)",
    )
    parser.add_argument("--output", type=path, metavar="DIR", help="write plan.txt, plan.json and plan.png there")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the JSON there")
    parser.add_argument(
        "--no-suggestions", "--no-advice", action="store_true", help="do not look for changes that fit or are faster"
    )
    hints = get_type_hints(Assumptions, include_extras=True)
    for f in dataclasses.fields(Assumptions):
        text = f"{ASSUMPTIONS.fields[f.name]['description']} (%(default)s)"
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=option(hints[f.name]), default=f.default, metavar="X", help=text
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Plans as a command line says.

    Returns:
        0 if the recipe fits, 1 if it does not.

    Raises:
        UserError: something that the user can mend.
    """
    options, fields = build_parser().parse_known_args(argv)
    assumptions = Assumptions(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Assumptions)})
    ASSUMPTIONS.check(assumptions)
    gpu = find_gpu(options.gpu)
    if options.domain is not None:
        gpu = dataclasses.replace(gpu, domain=options.domain)
    if options.network_gbit is not None:
        gpu = dataclasses.replace(gpu, network=options.network_gbit * 1e9 / 8)
    recipe = read_recipe([options.recipe, *fields])
    with loading():
        from motifarch.plan.planning import make_plan
        from motifarch.plan.report import render
        from motifarch.plan.suggestions import find_faster, find_suggestions
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    name = Path(options.recipe).name
    known: dict[str, Any] = {"seq_len": options.seq_len, "tokens": options.tokens, "assumptions": assumptions}
    tried: list[Plan] = []

    def plan_it(other: Recipe) -> "Plan":
        tried.append(make_plan(other, gpu, options.gpus, **known))
        return tried[-1]

    with Console(stderr=True).status(f"running a step of {name} without data") as status:
        plan = plan_it(recipe)
        if not plan.fits and not options.no_suggestions:
            plan.suggestions = find_suggestions(plan, plan_it, say=status.update)
        elif not options.no_suggestions:
            plan.faster = find_faster(plan, plan_it, say=status.update)
    Console().print(render(plan, name))
    fitting = tried[-1] if plan.suggestions and plan.suggestions[-1].fits else None
    _write(options, name, plan, fitting)
    return 0 if plan.fits else 1


def _write(options: argparse.Namespace, name: str, plan: "Plan", fitting: "Plan | None") -> None:
    """Writes the files that were asked for."""
    from motifarch.plan.plots import draw_memory
    from motifarch.plan.report import as_text, to_json

    content = to_json(plan)
    try:
        if options.json is not None:
            write_json(options.json, content)
        if options.output is None:
            return
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "plan.json", content)
        with atomic_write(options.output / "plan.txt") as file:
            file.write(as_text(plan, name))
        bars = [("the recipe", plan)]
        if fitting is not None:
            changes = "\n".join(f"{k} {v}" for k, v in plan.suggestions[-1].changes.items())
            bars.append((f"with\n{changes}", fitting))
        draw_memory(bars, options.output / "plan.png", f"{name} on {plan.gpus} x {plan.gpu.name}")
    except OSError as error:
        name = error.filename or options.output or options.json
        raise UserError(f"can't write {name}: {error.strerror}; give another --output or --json") from None
    print(f"written: {options.output}/plan.txt, plan.json, plan.png")
