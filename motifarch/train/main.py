"""The `train` command: recipe, inputs, world, loop."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from motifarch.command_line import loading
from motifarch.die_with_parent import GRACE_S
from motifarch.errors import DISK_ERRORS, UserError, first_line
from motifarch.locks import locked, share
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe_rules import check_recipe
from motifarch.train.run_folder import LOCK
from motifarch.train.trackers import check_tracker

if TYPE_CHECKING:
    from motifarch.parallel import World

LOCK_PATIENCE_S = GRACE_S + 4.0
"""Seconds that the lock is waited for: longer than ranks without a launcher have to leave."""

_OUT_OF_MEMORY = re.compile("OutOfMemoryError|can't allocate memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as a command line says.

    Returns:
        The exit status (see `motifarch.train.loop.train`).

    Raises:
        UserError: something that the user can mend.
    """
    recipe = read_recipe(sys.argv[1:] if argv is None else argv)
    # Heavy imports only after the recipe has been read, so that a slip in it is reported at once.
    with loading():
        from motifarch.parallel import launched_world_size, open_world
    check_recipe(recipe, launched_world_size())
    check_tracker(recipe.log)
    with loading():
        from motifarch.train.inputs import open_inputs
        from motifarch.train.loop import train

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    inputs = open_inputs(recipe)
    try:
        with open_world(recipe.distributed.timeout_first_s) as world, only_writer(Path(recipe.run.output), world):
            return train(recipe, inputs, world)
    except (MemoryError, RuntimeError) as error:
        # Of the CPU's memory torch has no error of its own.
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(f"{type(error).__name__} {error}"):
            raise
        raise UserError(
            f"out of memory ({first_line(error)}); lower batch.micro_size, set activation_checkpointing, or take more "
            "ranks: `motifarch plan` says what a recipe needs"
        ) from None
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        if error.errno not in DISK_ERRORS and not Path(name).is_relative_to(recipe.run.output):
            raise
        raise UserError(
            f"can't write {error.filename or 'into ' + recipe.run.output}: {error.strerror}; the complete checkpoints "
            f"in {recipe.run.output} are untouched. Free space or mend that, and start the same command again to resume"
        ) from None


@contextlib.contextmanager
def only_writer(output: Path, world: "World") -> Iterator[None]:
    """Makes a run's folder, and keeps every other start out of it until the last rank has ended.

    Raises:
        UserError: another run is at work there, or it can't be made.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"run.output is {output}, which can't be made: {error.strerror}") from None
            stack.enter_context(locked(output / LOCK, refuse, patience_s=LOCK_PATIENCE_S))

        def refuse(holder: str) -> str:
            return (
                f"run.output is {output}, where another start of a run is at work ({holder}); "
                "wait until it ends, stop it, or give another --run.output"
            )

        world.run_on_main_and_broadcast(claim)
        if not world.is_main:
            stack.enter_context(share(output / LOCK, world.rank))
        yield
