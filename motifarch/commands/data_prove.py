"""`motifarch data prove`: shows that one row is in prepared data, without the other rows."""

import json
from collections.abc import Sequence

from motifarch.command_line import Parser, loading, option, path, writing
from motifarch.field_types import Count


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.data.row_tree.prove`."""
    parser = Parser(
        prog="motifarch data prove",
        description="Write a row of prepared data with the few hashes that show it to be there, for `motifarch verify "
        "--row`: the other rows stay with whoever holds them.",
        examples=["motifarch data prove data/stdlib --row 17 --output row_17.json"],
    )
    parser.add_argument("data", type=path, help="a prepared folder")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--row", type=option(Count), required=True, metavar="N", help="the row's number, from 0")
    parser.add_argument("--output", type=path, required=True, metavar="FILE.json")
    given = parser.parse_args(argv)
    with loading():
        from motifarch.data.row_tree import prove
        from motifarch.files import atomic_write
    content = prove(given.data, given.split, given.row)
    with writing("--output"), atomic_write(given.output) as file:
        json.dump(content, file)
    print(f"row {given.row} of {content['rows']} is in {given.output}, with {len(content['path'])} hashes")
    print(f"  motifarch verify RUN --row {given.output}")
    return 0
