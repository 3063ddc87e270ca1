"""`motifarch grow`: a larger model from a smaller one, computing the same function at the start."""

import argparse
from collections.abc import Sequence

from motifarch.command_line import Parser, loading, option, path
from motifarch.field_types import FilePath, Fraction, Heads, Layers, Multiplier, Seed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.growth.grow`; returns the exit status.

    Raises:
        UserError: something does not fit, is missing or is damaged.
    """
    arguments = build_parser().parse_args(argv)
    with loading():
        from motifarch.growth.main import run
    return run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The options of ``motifarch grow``."""
    parser = Parser(
        prog="motifarch grow",
        description=__doc__,
        examples=[
            "motifarch grow model larger --hidden 2 --heads 2 --layers 40",
            "motifarch grow motif-2.6b motif-12.7b --like motif-2-12.7b",
            "motifarch grow motif-2.6b sparse --experts 16 --top-k 4 --dense-first 2 --streams 4",
            "motifarch grow llama-folder differential --to gda --ratio 4",
            "motifarch grow model larger --tokenizer tokenizers/o200k_ko",
            "motifarch grow glm-4.7-flash differential --to gdla",
        ],
    )
    parser.add_argument("source", type=path, help="a Motif model's Hugging Face folder; it is only read")
    parser.add_argument("output", type=path, help="the folder to make; it must not exist")
    parser.add_argument(
        "--like", metavar="LAYOUT", help="grow into this layout: motif-2-12.7b, or a Motif model's folder"
    )
    for name, multiplied in {
        "--hidden": "the hidden size",
        "--feed-forward": "the intermediate size",
        "--signal-heads": "signal heads; noise and key/value heads stay",
        "--heads": "all heads: signal, noise and key/value",
    }.items():
        parser.add_argument(name, type=option(Heads), default=1, metavar="N", help=f"multiply {multiplied}")
    parser.add_argument(
        "--layers", type=option(Layers), metavar="N", help="layers afterwards; new ones start as the identity"
    )
    parser.add_argument("--untie", action="store_true", help="give a tied output projection a matrix of its own")
    parser.add_argument(
        "--noise",
        type=option(Fraction),
        metavar="X",
        help="make copies differ by noise of X standard deviations that cancels in what they compute, such as 0.01",
    )
    parser.add_argument("--seed", type=option(Seed), default=0, help="of noise and routers (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the grown weights (default: the source's)")
    _add_sparse(parser)
    group = parser.add_argument_group("vocabulary")
    group.add_argument(
        "--tokenizer",
        type=option(FilePath),
        metavar="NEW",
        help="one that extends the model's, as `motifarch tokenizer extend` makes it: a new token's rows are the means "
        "of those of the tokens that it replaces",
    )
    group.add_argument(
        "--random-rows", action="store_true", help="draw new tokens' rows, as far apart as the old ones, by --seed"
    )
    group = parser.add_argument_group(
        "from a softmax model",
        "SOURCE may be a model of llama, mistral, qwen2, qwen3, or a Motif model with softmax attention; for gdla and "
        "mla one of deepseek_v3, glm4_moe_lite, youtu, or a Motif model with mla",
    )
    group.add_argument(
        "--to",
        choices=("diff_v2", "gda", "gdla", "mla"),
        help="make it a differential model that starts as the same function; mla: a Motif model, as it is",
    )
    group.add_argument(
        "--ratio",
        type=option(Heads),
        metavar="G",
        help="signal heads for each noise head (default: 1; for gda as many as share a key/value head)",
    )
    group.add_argument("--sub-norm", action="store_true", help="normalise each head's output; needs --approximate")
    group.add_argument(
        "--approximate", action="store_true", help="allow what cannot start as the same function, and say how far it is"
    )
    group.add_argument(
        "--probe", type=path, metavar="TEXT", help="with --approximate: measure on this text file, not on random tokens"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not run both models to compare their logits"
    )
    return parser


def _add_sparse(parser: argparse.ArgumentParser) -> None:
    """Options of experts and hyper-connections."""
    group = parser.add_argument_group("experts and hyper-connections", "after the rest has grown")
    for name, kind, said in (
        ("--experts", Heads, "experts of a layer, copies of its dense block"),
        ("--top-k", Heads, "of which each token takes N"),
        ("--granularity", Heads, "cut a block into N experts; SwiGLU only (default: 1)"),
        ("--shared-experts", Heads, "shared experts, which start silent (default: none)"),
        ("--dense-first", Layers, "layers at the start that stay dense (default: none)"),
        ("--every", Layers, "of the others, every Nth gets experts (default: 1)"),
    ):
        group.add_argument(name, type=option(kind), metavar="N", help=said)
    group.add_argument(
        "--route-scale", type=option(Multiplier), metavar="X", help="the sum of a token's weights (default: 1)"
    )
    group.add_argument(
        "--expert-noise",
        type=option(Fraction),
        metavar="X",
        help="make experts differ by noise of X standard deviations; they then are another function",
    )
    group.add_argument(
        "--streams", type=option(Heads), metavar="N", help="residual streams of hyper-connections, 4 in Motif-3"
    )
