"""`motifarch generate`: text from a Hugging Face folder, streamed, or for many prompts."""

import argparse
import os
import sys
from collections.abc import Sequence

from motifarch.command_line import Parser, loading, option, path
from motifarch.field_types import Length, Probability, Rows, Seed, Temperature

_SEED_HELP = (
    "with a prompt's number among --prompts, decides its random draws, whichever prompts it is batched with "
    "(default: 0). Rounding, which changes with batch size, padding, device and versions, can still tip a token"
)
_SPEED_HELP = (
    "At the end, standard error gets the time of the prompts' own pass, which gives each its first new token, and the "
    "tokens per second after it: of all prompts in a batch together, and without the padding of those that ended early."
)


def build_parser() -> argparse.ArgumentParser:
    """The options of ``motifarch generate``."""
    parser = Parser(
        prog="motifarch generate",
        description=__doc__,
        epilog=_SPEED_HELP,
        examples=[
            "motifarch generate runs/tiny_cpu/export --prompt 'import os'",
            "motifarch generate model --chat --prompt 'What is attention?' --temperature 0.6",
            "motifarch generate model --prompts prompts.jsonl --output texts.jsonl --batch-size 16",
        ],
    )
    parser.add_argument(
        "folder", type=path, help="a folder that motifarch export wrote, or any causal language model's"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue, streamed; - reads it from standard input, less one final newline (default: none, a new "
        "document)",
    )
    source.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help='a text file with a prompt a line, or a .jsonl file with {"prompt": "..."} or {"messages": [{"role": '
        '"user", "content": "..."}]} a line; messages go through the chat template. Each result is a line of JSON, in '
        'the order of the file: the line with "text", "tokens" (end-of-sequence included) and "finish" ("eos" or '
        '"length") added',
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="write the results of --prompts there, once all are done, instead of to standard output as they come; "
        "until then, and if interrupted, they are in FILE.partial",
    )
    parser.add_argument(
        "--batch-size",
        type=option(Rows),
        metavar="N",
        help="how many of --prompts to continue at once (default: 8, with --speculative 1); those that leave less room "
        "in the model than --max-new-tokens only with others that leave as much",
    )
    parser.add_argument("--chat", action="store_true", help="make the prompt a user message, and print the reply alone")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument("--max-new-tokens", type=option(Length), default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--temperature", type=option(Temperature), default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-p", type=option(Probability), default=0.95, help="nucleus sampling (default: 0.95)")
    parser.add_argument("--seed", type=option(Seed), default=0, help=_SEED_HELP)
    parser.add_argument(
        "--cache",
        choices=("dynamic", "static"),
        default="dynamic",
        help="dynamic grows with the text; static has its final size at once, and lets transformers compile a GPU's "
        "passes, which takes time at the start (default: dynamic)",
    )
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="draft tokens with the model's layer for multi-token prediction, as Motif-3 has: the same text, faster if "
        "many are accepted (the share is told at the end); one prompt at a time",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``motifarch generate``; returns 1 if whoever read the standard output stopped reading.

    Raises:
        UserError: for anything that the user can mend.
    """
    arguments = build_parser().parse_args(argv)
    with loading():
        from motifarch.inference.generate import run
    try:
        speed = run(arguments)
    except BrokenPipeError:
        # head, or less, has seen enough; Python must not try to flush once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"[{speed}]", file=sys.stderr)
    return 0
