"""`motifarch average`: the mean of a run's last checkpoints, as a checkpoint."""

from collections.abc import Sequence

from motifarch.command_line import Parser, loading, option, path, path_or_url
from motifarch.field_types import PositiveCount


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.average.average`."""
    parser = Parser(
        prog="motifarch average",
        description=__doc__,
        examples=["motifarch average runs/tiny_cpu --output runs/mean --last 2"],
    )
    parser.add_argument("run", type=path_or_url, help="a run's output folder, on disk or as a URL (s3://...)")
    parser.add_argument("--last", type=option(PositiveCount), default=6, help="checkpoints to average (default: 6)")
    parser.add_argument("--output", type=path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    with loading():
        from motifarch.average import AVERAGE_OF, average
        from motifarch.train.manifest import read_manifest
    checkpoint = average(arguments.run, arguments.output, arguments.last)
    steps = ", ".join(map(str, read_manifest(checkpoint)["about"][AVERAGE_OF]))
    print(f"the mean of steps {steps} is in {checkpoint}")
    print(f"  motifarch export {arguments.output}, or begin a run with --run.init_from {checkpoint}")
    return 0
