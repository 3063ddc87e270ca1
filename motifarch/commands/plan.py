"""`motifarch plan`: what a recipe needs on a cluster, found on one CPU."""

import argparse
import dataclasses
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import Field
from rich.console import Console

from motifarch.command_line import Parser, comma_separated, loading, option, path
from motifarch.counted import counted
from motifarch.errors import UserError
from motifarch.field_types import FilePath, Length, Multiplier, Ranks
from motifarch.files import atomic_write, write_json
from motifarch.hardware import GPUS, Gpu, find_gpu
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
        usage="%(prog)s RECIPE.yaml [RECIPE.yaml ...] --gpus N --gpu NAME [options] [--section.field VALUE ...]",
        description="Say what a recipe needs on a number of GPUs: memory, traffic, FLOPs, time. Needs no GPU.",
        examples=[
            "motifarch plan motif_2.6b/b200_64 --gpus 64 --gpu b200 --seq-len 4096",
            "motifarch plan my.yaml --gpus 8 --gpu h100 --output plan --batch.micro_size 2",
            "motifarch plan first.yaml second.yaml --gpus 64 --gpu b200 --seq-len 4096,32768 --output plan",
        ],
    )
    parser.add_argument(
        "recipes",
        type=option(FilePath),
        nargs="+",
        metavar="RECIPE.yaml",
        help="the recipe; several are stages of one run, in one report",
    )
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
        type=comma_separated(Length),
        metavar="N[,N ...]",
        help="tokens of a sequence, for all recipes or one for each (default: as the recipe's data was prepared)",
    )
    parser.add_argument(
        "--tokens",
        type=comma_separated(_TOKENS),
        metavar="X[,X ...]",
        help="tokens of the run, such as 5.5e12; of several recipes, of each one (default: the recipe's steps)",
    )
    parser.add_argument("--output", type=path, metavar="DIR", help="write plan.txt, .json, .png and .html there")
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
    lengths, tokens = (_one_each(options, name) for name in ("seq_len", "tokens"))
    recipes = [read_recipe([recipe, *fields]) for recipe in options.recipes]
    if len(recipes) > 1:
        return _plan_stages(options, recipes, gpu, lengths, tokens, assumptions)
    recipe = recipes[0]
    with loading():
        from motifarch.plan.planning import make_plan
        from motifarch.plan.report import render
        from motifarch.plan.suggestions import find_faster, find_suggestions
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    name = Path(options.recipes[0]).name
    known: dict[str, Any] = {"seq_len": lengths[0], "tokens": tokens[0], "assumptions": assumptions}
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
    from motifarch.plan.report import render, to_json

    bars = [("the recipe", plan)]
    if fitting is not None:
        changes = "\n".join(f"{k} {v}" for k, v in plan.suggestions[-1].changes.items())
        bars.append((f"with\n{changes}", fitting))
    _write_files(options, to_json(plan), render(plan, name), bars, f"{name} on {plan.gpus} x {plan.gpu.name}")


def _one_each(options: argparse.Namespace, name: str) -> list[Any]:
    """An option's value for each recipe."""
    given, count = getattr(options, name) or [None], len(options.recipes)
    if len(given) not in (1, count) or (name == "tokens" and len(given) != count and given != [None]):
        raise UserError(
            f"--{name.replace('_', '-')} has {counted(len(given), 'value')} for {counted(count, 'recipe')}; give one "
            "for each, in their order, with commas between"
        )
    return given if len(given) == count else given * count


def _plan_stages(
    options: argparse.Namespace,
    recipes: list[Recipe],
    gpu: Gpu,
    lengths: list[int | None],
    tokens: list[float | None],
    assumptions: Assumptions,
) -> int:
    """Plans several recipes, each in a process of its own: they share nothing."""
    with loading():
        from motifarch.plan.report import to_json
        from motifarch.plan.stages import render_stages
    with (
        Console(stderr=True).status(f"running a step of {len(recipes)} recipes without data"),
        ProcessPoolExecutor(min(len(recipes), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool,
    ):
        known = [(options.gpus, length, of_all, assumptions) for length, of_all in zip(lengths, tokens, strict=True)]
        found = list(pool.map(_plan_stage, options.recipes, recipes, [gpu] * len(recipes), known))
    plans = [(Path(name).stem, plan) for name, plan in zip(options.recipes, found, strict=True)]
    content = render_stages(plans)
    Console().print(content)
    stages = [to_json(plan) for plan in found]
    together = {"tokens": sum(p.tokens for p in found), "days": sum(p.days for p in found)}
    title = f"{len(plans)} stages on {options.gpus} x {gpu.name}"
    _write_files(options, {"stages": stages, "together": together}, content, plans, title)
    return 0 if all(plan.fits for plan in found) else 1


def _plan_stage(name: str, recipe: Recipe, gpu: Gpu, known: tuple[Any, ...]) -> "Plan":
    with loading():
        from motifarch.plan.planning import make_plan
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    gpus, length, tokens, assumptions = known
    try:
        return make_plan(recipe, gpu, gpus, seq_len=length, tokens=tokens, assumptions=assumptions)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _write_files(
    options: argparse.Namespace, as_json: dict[str, Any], content: Any, bars: list[tuple[str, "Plan"]], title: str
) -> None:
    from motifarch.plan.plots import draw_plans
    from motifarch.plan.report import plain
    from motifarch.plan.stages import as_page

    try:
        if options.json is not None:
            write_json(options.json, as_json)
        if options.output is None:
            return
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "plan.json", as_json)
        with atomic_write(options.output / "plan.txt") as file:
            file.write(plain(content))
        picture = options.output / "plan.png"
        draw_plans(bars, picture, title)
        with atomic_write(options.output / "plan.html") as file:
            file.write(as_page(content, picture, title))
    except OSError as error:
        name = error.filename or options.output or options.json
        raise UserError(f"can't write {name}: {error.strerror}; give another --output or --json") from None
    print(f"written: {options.output}/plan.txt, plan.json, plan.png, plan.html")
