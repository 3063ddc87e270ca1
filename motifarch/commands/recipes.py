"""`motifarch recipes`: the recipes that come with the package."""

import textwrap
from collections.abc import Sequence

from motifarch import packaged_recipes
from motifarch.command_line import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Lists the recipes and studies with a line each."""
    Parser(
        prog="motifarch recipes",
        description="List the recipes that come with the package; all commands take them by these names.",
        examples=["motifarch recipes", "motifarch train tiny_cpu", "motifarch recipes copy tiny_cpu recipes"],
    ).parse_args(argv)
    for name in [*packaged_recipes.names(), *packaged_recipes.studies()]:
        print(f"{name:<33}{textwrap.shorten(packaged_recipes.summary(name), 80, placeholder=' ...')}")
    print("\nTo change one: motifarch recipes copy NAME. Those of study/ are for motifarch benchmark head-ratio.")
    return 0
