"""`motifarch data merge`: one prepared folder of the shards that several machines made."""

from collections.abc import Sequence

from motifarch.command_line import Parser, loading, path
from motifarch.counted import counted


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.data.merge.merge`."""
    parser = Parser(
        prog="motifarch data merge",
        description=__doc__,
        examples=["motifarch data merge data/shard_1 data/shard_2 --output data/all"],
    )
    parser.add_argument("shards", type=path, nargs="+", metavar="DIR", help="all folders of `data prepare --shard`")
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="the folder to make")
    arguments = parser.parse_args(argv)
    with loading():
        from motifarch.data.merge import merge
    made = merge(arguments.shards, arguments.output, print)
    print(f"{arguments.output}: {counted(len(arguments.shards), 'shard')}, fingerprint {made.fingerprint[:12]}")
    for split, n in made.splits.items():
        blocks = counted(n.blocks, f"block of {made.seq_len}")
        print(f"  {split}: {counted(n.documents, 'document')}, {counted(n.tokens, 'token')}, {blocks}")
    return 0
