"""Reads a recipe: YAML and dotted overrides into typed dataclasses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jsonargparse

from motifarch import packaged_recipes
from motifarch.train.recipe import Recipe
from motifarch.typed_yaml import TypedYaml

_RECIPES = TypedYaml(
    Recipe,
    "recipe",
    prog="motifarch train",
    usage="%(prog)s RECIPE [--section.field VALUE ...]",
    description="Train a language model as a recipe says. "
    "RECIPE is a file, or the name of one that comes with the package: "
    f"{', '.join(packaged_recipes.names())}. "
    "Several processes: torchrun --standalone --nproc-per-node N -m motifarch.train RECIPE.yaml [...]",
)


def build_parser() -> jsonargparse.ArgumentParser:
    """Returns the parser of all recipe fields, `--config` among them."""
    return _RECIPES.parser()


def read_recipe(argv: Sequence[str]) -> Recipe:
    """Reads a recipe from a command line.

    Args:
        argv: ``RECIPE.yaml --section.field value --section.field=value ...``, the file being
            optional. A file's `base` is read before it.

    Returns:
        The recipe, types checked; `motifarch.train.recipe.check_recipe` checks what holds between
        fields.

    Raises:
        UserError: a missing or unreadable file, an unknown field, a value of the wrong type.
    """
    return _RECIPES.read(argv)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(recipe)
