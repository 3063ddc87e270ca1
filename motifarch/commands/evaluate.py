"""`motifarch eval`: a Hugging Face folder on lm-eval's tasks, or on your own."""

import argparse
import json
from collections.abc import Sequence
from typing import Literal

from motifarch.command_line import Parser, loading, option, path
from motifarch.counted import counted
from motifarch.errors import UserError
from motifarch.field_types import Count, FilePath, Rows, Weight
from motifarch.files import write_json

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _tasks(text: str) -> list[str]:
    return [option(FilePath)(part.strip()) for part in text.split(",") if part.strip()]


def build_parser() -> argparse.ArgumentParser:
    """The options of ``motifarch eval``."""
    parser = Parser(
        prog="motifarch eval",
        description=__doc__,
        examples=[
            "motifarch eval runs/tiny_cpu/export --data data/stdlib",
            "motifarch eval runs/tiny_cpu/export --tasks lambada_openai --limit 100",
            "motifarch eval model --tasks 'mmlu_*,my_task.yaml' --num-fewshot 5 --batch-size auto --output scores.json",
        ],
        epilog="Tasks need lm-eval (pip install 'motifarch[eval]'). Most of them fetch data from the Hub.",
    )
    parser.add_argument(
        "folder", type=path, help="a folder that motifarch export wrote, or any causal language model's"
    )
    parser.add_argument(
        "--tasks",
        type=_tasks,
        metavar="TASK,...",
        help="names of lm-eval's tasks or groups (a * stands for anything), YAML files, or folders of YAML files",
    )
    parser.add_argument(
        "--data",
        type=path,
        metavar="DIR",
        help="instead of tasks: loss and bits per byte on the validation split of a folder that `motifarch data "
        "prepare` made with the model's tokenizer",
    )
    parser.add_argument(
        "--limit",
        type=option(Weight),
        metavar="N",
        help="only the first N examples of each task (with --data, N sequences, evenly spread), or that share of them "
        "if N is below 1 (to try things out: such scores compare with nothing)",
    )
    parser.add_argument(
        "--batch-size",
        type=option(Literal["auto"] | Rows),
        default=1,
        metavar="N",
        help="rows at once, or auto (default: 1)",
    )
    parser.add_argument(
        "--num-fewshot",
        type=option(Count),
        metavar="N",
        help="solved examples before each question (default: what each task says; one that says 0 keeps 0)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as saved)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--output", type=path, metavar="FILE", help="write all results there, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``motifarch eval``.

    Raises:
        UserError: for anything that the user can mend.
    """
    arguments = build_parser().parse_args(argv)
    if (arguments.tasks is None) == (arguments.data is None):
        raise UserError("give either --tasks or --data: what to evaluate on")
    if arguments.data is not None:
        return _validate(arguments)
    tasks: list[str] = arguments.tasks
    _check(arguments, tasks)
    with loading():
        from motifarch.inference.evaluate import evaluate
    results = evaluate(
        arguments.folder,
        tasks,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        num_fewshot=arguments.num_fewshot,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if arguments.output is not None:
        write_json(arguments.output, json.loads(json.dumps(results, default=handle_non_serializable)))
        print(f"written to {arguments.output}")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    for name, default in (("num_fewshot", None), ("batch_size", 1)):
        if getattr(arguments, name) != default:
            raise UserError(f"--{name.replace('_', '-')} is for --tasks; leave it out with --data")
    _check(arguments, ["--data"])
    with loading():
        from motifarch.inference.validation import validate
    found = validate(
        arguments.folder, arguments.data, limit=arguments.limit, dtype=arguments.dtype, device=arguments.device
    )
    bits = found["bits_per_byte"]
    print(f"loss {found['loss']:.4f} nats/token, {'–' if bits is None else f'{bits:.4f}'} bits per byte")
    print(f"  over {found['tokens']:,} tokens in {counted(found['sequences'], 'sequence')} of {arguments.data}")
    if arguments.output is not None:
        write_json(arguments.output, found)
        print(f"written to {arguments.output}")
    return 0


def _check(arguments: argparse.Namespace, tasks: list[str]) -> None:
    """Checks settings before anything is loaded."""
    if not tasks:
        raise UserError("--tasks names no task; give names or files, with commas between")
    limit, output = arguments.limit, arguments.output
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise UserError(f"--limit is {limit:g}; give a number of examples, or a share of them between 0 and 1")
    if output is not None:
        if output.is_dir():
            raise UserError(f"--output {output} is a folder; give a file")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror}; give another") from None
