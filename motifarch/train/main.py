"""The `train` command: recipe, inputs, world, loop."""

import logging
import sys
from collections.abc import Sequence

from motifarch.errors import DISK_ERRORS, UserError
from motifarch.parallel import launched_world_size, open_world
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import check_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as a command line says.

    Returns:
        The exit status (see `motifarch.train.loop.train`).

    Raises:
        UserError: something that the user can mend.
    """
    recipe = read_recipe(sys.argv[1:] if argv is None else argv)
    check_recipe(recipe, launched_world_size())
    # Heavy imports only after the recipe has been read, so that a slip in it is reported at once.
    from motifarch.train.inputs import open_inputs
    from motifarch.train.loop import train

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    inputs = open_inputs(recipe)
    try:
        with open_world(recipe.distributed.timeout_first_s) as world:
            return train(recipe, inputs, world)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"can't write {error.filename or 'into ' + recipe.run.output}: {error.strerror}; the complete checkpoints "
            f"in {recipe.run.output} are untouched. Free space there and start the same command again to resume"
        ) from None
