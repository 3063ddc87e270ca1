"""The mean of a run's last checkpoints, as a checkpoint."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from motifarch.errors import UserError
from motifarch.files import claim_folder, new_folder, write_json
from motifarch.optim.averaging import PREFIX, CheckpointMean
from motifarch.progress import Advance, progress
from motifarch.storage import is_url
from motifarch.train.checkpoint import CheckpointWriter
from motifarch.train.fetching import fetched_run
from motifarch.train.lineage import LINK, AverageLineage
from motifarch.train.manifest import checkpoint_name, checkpoints_folder, complete_checkpoints, step_of
from motifarch.train.run_folder import RECORD, read_record
from motifarch.train.trained_model import read_about

AVERAGE_OF = "average_of"
"""What marks an average in a manifest and in a run's record: the steps."""


class _MeanPlanner(DefaultSavePlanner):
    """Gives each weight's mean when it is about to be written, and not before."""

    def __init__(self, mean: CheckpointMean, weights: dict[str, torch.Tensor], advance: Advance) -> None:
        super().__init__()
        self._mean = mean
        self._weights = weights
        self._advance = advance

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        name = write_item.index.fqn.removeprefix(PREFIX)
        value = self._mean.mean({name: torch.empty_like(self._weights[name], device="cpu")})[name]
        if not value.isfinite().all():
            raise UserError(f"{name} is not finite in the checkpoints' mean; average others, or train them again")
        self._advance()
        return value


def average(run: Path | str, output: Path, last: int, *, origin_name: str | None = None) -> Path:
    """Write the mean of a run's last complete checkpoints, one tensor at a time.

    Args:
        run: a run's output folder; of a URL's, the checkpoints are copied beside the output
            meanwhile.
        output: folder to write: a run's with one checkpoint, for `motifarch export`; its checkpoint
            is for `run.init_from`. An earlier average is replaced once the new one is whole.
        last: checkpoints to average.
        origin_name: what the record calls the run, where that is not its path.

    Returns:
        The checkpoint's folder. It holds weights, no moments.

    Raises:
        UserError: no run there, too few complete checkpoints, checkpoints that differ in shape, or
            an output that is no average.
    """
    if last < 1:
        raise UserError(f"--last is {last}; it must be at least 1")
    if isinstance(run, str) and is_url(run):
        with fetched_run(run, near=output, last=last) as copy:
            return average(copy, output, last, origin_name=run)
    run = Path(run)
    record = read_record(run)
    if output.exists() and AVERAGE_OF not in read_record(output):
        raise UserError(f"{output} exists and is no average; give another --output")
    found = complete_checkpoints(checkpoints_folder(run), warn=lambda line: print(f"warning: {line}"), limit=last)
    if not found:
        raise UserError(f"{run} holds no complete checkpoint; give a run's output folder, such as runs/tiny_cpu")
    if len(found) < last:
        raise UserError(
            f"--last is {last}, but {run} holds {len(found)} complete checkpoint{'s' * (len(found) != 1)}; "
            "use fewer, or keep more with checkpoint.keep_last"
        )
    steps = [step_of(checkpoint) or 0 for checkpoint in found]
    about: dict[str, Any] = read_about(found[0]) | {AVERAGE_OF: steps}
    about.pop(LINK, None)  # the newest one's own
    mean = CheckpointMean(found)
    weights = mean.weights()
    with (
        claim_folder(output, print),
        new_folder(output) as folder,
        progress("averaging", len(weights)) as advance,
    ):
        target = checkpoints_folder(folder) / checkpoint_name(steps[0])
        target.parent.mkdir()
        writer = CheckpointWriter(target, steps[0], about, AverageLineage(folder, run, found))
        planner = _MeanPlanner(mean, weights, advance)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.save({PREFIX[:-1]: weights}, storage_writer=writer, planner=planner, no_dist=True)
            except dcp.CheckpointException as error:  # it is no Exception
                raise error.failures[0][0] from None
        write_json(folder / RECORD, record | {AVERAGE_OF: steps, "averaged_run": origin_name or str(run)})
    return checkpoints_folder(output) / target.name
