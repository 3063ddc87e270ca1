"""`motifarch runs`: runs beside each other, in a table and a plot."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from motifarch.command_line import Parser, loading, option, path, path_or_url
from motifarch.errors import UserError
from motifarch.field_types import PositiveCount


def main(argv: Sequence[str] | None = None) -> int:
    """Compares the runs in folders, as a command line says.

    Raises:
        UserError: there is no run, or the plot can't be written.
    """
    parser = Parser(
        prog="motifarch runs",
        description="Compare the runs in a folder: state, steps, tokens, loss, bits per byte, speed, the recipe fields "
        "that differ, and a plot of their losses by tokens and by time.",
        examples=[
            "motifarch runs runs",
            "motifarch runs runs/lr_* --last 100 --output compared.png",
            "motifarch runs s3://bucket/runs --output compared.png",
        ],
    )
    parser.add_argument(
        "folders",
        type=path_or_url,
        nargs="+",
        metavar="DIR",
        help="a run's folder, or one that holds runs, on disk or as a URL (s3://...)",
    )
    parser.add_argument(
        "--last", type=option(PositiveCount), metavar="N", help="steps that losses are means of (default: log.every)"
    )
    parser.add_argument(
        "--output", type=path, metavar="FILE.png", help="the plot (default: runs.png in the first folder)"
    )
    arguments = parser.parse_args(argv)
    with loading():
        from motifarch import runs
        from motifarch.train.fetching import fetch_figures
    if isinstance(arguments.folders[0], str) and not arguments.output:
        raise UserError(f"{arguments.folders[0]} is a URL, where no plot can be written; give --output FILE.png")
    found: dict[Path, str] = {}
    with TemporaryDirectory() as copies:
        for number, given in enumerate(arguments.folders):
            folder = fetch_figures(given, Path(copies) / str(number)) if isinstance(given, str) else given
            for run in runs.find_runs(folder, str(given)):
                inside = run.relative_to(folder)
                alone = str(inside) != "." and len(arguments.folders) == 1
                name = str(run) if folder == given else f"{given}/{inside}".removesuffix("/.")
                found.setdefault(run, str(inside) if alone else name)
        summaries = [runs.summarise(run, name, arguments.last or 0) for run, name in found.items()]
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(runs.table(summaries))
    if runs.differences(summaries):
        console.print()
        console.print(runs.table_of_differences(summaries))
    target = arguments.output or arguments.folders[0] / "runs.png"
    try:
        runs.draw(summaries, target)
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror}; give another --output") from None
    console.print(f"\nplot: {target}", soft_wrap=True)
    return 0
