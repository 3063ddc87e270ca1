"""`motifarch benchmark report`: the report of a head-ratio study's results, written again."""

from collections.abc import Sequence

from motifarch.command_line import Parser, loading, path
from motifarch.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Renders the report of a study's results again."""
    parser = Parser(
        prog="motifarch benchmark report",
        description=__doc__,
        examples=[
            "motifarch benchmark report runs/study/results.json",
            "motifarch benchmark report runs/study/results.json --output pages",
        ],
    )
    parser.add_argument("results", type=path, metavar="RESULTS.json", help="the results.json of a study")
    parser.add_argument("--output", type=path, metavar="DIR", help="where to (default: beside the results)")
    options = parser.parse_args(argv)
    with loading():
        from motifarch.study.analysis import read_results
        from motifarch.study.report import HTML, MARKDOWN, write_report
    folder = options.output or options.results.parent
    results = read_results(options.results)
    try:
        write_report(results, folder)
    except OSError as error:
        raise UserError(f"can't write into {folder}: {error.strerror}; give another --output") from None
    print(f"written: {folder / HTML}, {folder / MARKDOWN}")
    return 0
