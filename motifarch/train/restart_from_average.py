"""Going on from the mean of the last checkpoints, as Motif-2.6B did (arXiv 2508.09148).

A checkpoint always holds the weights as they were trained; the mean takes their place before the
step that follows. A run that resumes from that checkpoint does the same again.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from motifarch.errors import UserError
from motifarch.optim import CheckpointMean
from motifarch.parallel import World
from motifarch.train.checkpoint import TrainState
from motifarch.train.manifest import checkpoint_name, checkpoints_folder, complete_checkpoints, step_of
from motifarch.train.recipe import Recipe


def average_due(recipe: Recipe, step: int) -> bool:
    """Whether the mean takes the weights' place after so many steps."""
    return bool(recipe.average.every) and step > 0 and step % recipe.average.every == 0


@torch.no_grad()
def restart_from_average(state: TrainState, recipe: Recipe, parent: Path | None, world: World) -> list[int]:
    """Replaces the model's weights by the mean of the last checkpoints; moments stay as they are.

    Called by all ranks, when the checkpoint of this step is complete.

    Args:
        state: its model is changed in place.
        recipe: `average.last` checkpoints are averaged, this step's among them, or all there are.
        parent: what the run resumed from; where it is of this step, its neighbours are averaged.
        world: the ranks.

    Returns:
        The steps of the checkpoints that were averaged, newest first.

    Raises:
        UserError: a checkpoint can't be read or does not fit the model.
    """
    resumed = parent is not None and step_of(parent) == state.step
    folder = parent.parent if parent and resumed else checkpoints_folder(Path(recipe.run.output))
    # Rank 0 reads them once more than it must: a bit that has changed would go on in every weight.
    checkpoints = world.run_on_main_and_broadcast(
        lambda: complete_checkpoints(
            folder, up_to=state.step, limit=recipe.average.last, warn=lambda line: print(f"warning: {line}")
        )
    )
    if not checkpoints or step_of(checkpoints[0]) != state.step:
        raise UserError(
            f"average.every is {recipe.average.every}, and the mean after step {state.step} needs that step's "
            f"checkpoint, which {folder} lacks; resume from a checkpoint that is named {checkpoint_name(state.step)}"
        )
    weights: dict[str, Any] = get_model_state_dict(state.model)
    CheckpointMean(checkpoints).fill(weights)
    return [step_of(checkpoint) or 0 for checkpoint in checkpoints]
