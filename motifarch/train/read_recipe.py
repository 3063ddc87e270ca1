"""Reads a recipe: YAML and dotted overrides into typed dataclasses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from motifarch.train.recipe import RECIPES, Recipe


def read_recipe(argv: Sequence[str]) -> Recipe:
    """Reads a recipe from a command line.

    Args:
        argv: ``RECIPE.yaml --section.field value --section.field=value ...``, the file being
            optional. A file's `base` is read before it.

    Each value is checked; `motifarch.train.recipe_rules.check_recipe` checks what holds between
    fields.

    Raises:
        UserError: a missing or unreadable file, an unknown field, a value that is not accepted.
    """
    return RECIPES.read(argv)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(recipe)
