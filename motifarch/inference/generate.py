"""`motifarch generate`: text from a Hugging Face folder, streamed, or for many prompts."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import motifarch.integrations
import motifarch.models  # noqa: F401  # both for the Auto classes to know motifarch's models
from motifarch.command_line import Parser, option, path
from motifarch.errors import UserError, first_line
from motifarch.field_types import Length, Probability, Rows, Seed, Temperature
from motifarch.inference.prompts import conversation, read_prompts, result_file
from motifarch.inference.sampling import CACHES, Prompt, Sampling, Speed, generate, set_aside_settings
from motifarch.model_folder import CONFIG, GENERATION, check_json_files, explained
from motifarch.weight_files import WeightFiles, file_names

_SEED_HELP = (
    "with a prompt's number among --prompts, decides its random draws, whichever prompts it is batched with "
    "(default: 0). Rounding, which changes with batch size, padding, device and versions, can still tip a token"
)
_SPEED_HELP = (
    "At the end, standard error gets the time of the prompts' own pass, which gives each its first new token, and the "
    "tokens per second after it: of all prompts in a batch together, and without the padding of those that ended early."
)


def check_folder(folder: Path) -> None:
    """Raise a UserError for what is no Hugging Face model folder."""
    if not (folder / "config.json").is_file():
        hint = f"; export it first: motifarch export {folder}" if (folder / "checkpoints").is_dir() else ""
        raise UserError(f"{folder} is no Hugging Face model folder (it has no config.json){hint}")


def load(
    folder: Path, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a folder's model and tokenizer, ready to generate or to be evaluated, on the GPU if
    there is one unless a device is named; the dtype "auto" leaves weights as they are saved.

    Raises:
        UserError: the folder is missing or does not load, or there is no such device.
    """
    check_folder(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(
            f"device {device!r} is not there ({first_line(error)}); give cpu, or cuda on a machine with a GPU"
        ) from None
    check_json_files(folder)
    if any((folder / file).is_file() for file in file_names()):
        WeightFiles(folder)  # every architecture's files are looked at before transformers opens them
    with explained(f"{folder / CONFIG}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with explained(f"the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some damages show in its use alone
    if (folder / GENERATION).exists():
        with explained(f"{folder / GENERATION}"):
            GenerationConfig.from_pretrained(folder)  # transformers would go on without it
    with explained(f"the model of {folder}"):
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
    if aside := set_aside_settings(model, tokenizer):
        print(f"[{folder}/generation_config.json: {', '.join(aside)} set aside; the options decide]", file=sys.stderr)
    return model.to(device=device).eval(), tokenizer  # type: ignore[call-arg]  # transformers hides its signature


def build_parser() -> argparse.ArgumentParser:
    """The options of ``motifarch generate``."""
    parser = Parser(prog="motifarch generate", description=__doc__, epilog=_SPEED_HELP)
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
        default=8,
        metavar="N",
        help="how many of --prompts to continue at once (default: 8); those that leave less room in the model than "
        "--max-new-tokens only with others that leave as much",
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
        choices=CACHES,
        default="dynamic",
        help="dynamic grows with the text; static has its final size at once, and lets transformers compile a GPU's "
        "passes, which takes time at the start (default: dynamic)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``motifarch generate``; returns 1 if whoever read the standard output stopped reading.

    Raises:
        UserError: for anything that the user can mend.
    """
    arguments = build_parser().parse_args(argv)
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed, arguments.cache
    )
    try:
        speed = _one(arguments, sampling) if arguments.prompts is None else _many(arguments, sampling)
    except BrokenPipeError:
        # head, or less, has seen enough; Python must not try to flush once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"[{speed}]", file=sys.stderr)
    return 0


def _one(arguments: argparse.Namespace, sampling: Sampling) -> Speed:
    if arguments.output is not None:
        raise UserError(
            f"--output {arguments.output} is for the results of --prompts; redirect the text with > instead"
        )
    if arguments.chat and arguments.prompt is None:
        raise UserError("--chat has nothing to answer; give --prompt or --prompts")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system is part of a conversation; add --chat, or leave --system out")
    text = _standard_input() if arguments.prompt == "-" else arguments.prompt or ""
    prompt: Prompt = conversation(text, arguments.system) if arguments.chat else text
    speed = Speed()
    for _ in generate(*load(arguments.folder), [prompt], sampling, stream=True, speed=speed):
        pass
    return speed


def _standard_input() -> str:
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt on standard input is not UTF-8 (at byte {error.start + 1}); convert it, for example with iconv"
        ) from None
    return text.removesuffix("\n")


def _many(arguments: argparse.Namespace, sampling: Sampling) -> Speed:
    output: Path | None = arguments.output
    if output is not None and output.exists() and arguments.prompts.exists() and output.samefile(arguments.prompts):
        raise UserError(f"--output {output} is the file of --prompts; give another")
    requests = read_prompts(arguments.prompts, chat=arguments.chat, system=arguments.system)
    speed = Speed()
    # Opened before the model is loaded: a folder that cannot be written to is known at once.
    with result_file(output) if output is not None else nullcontext(_print) as write:
        model, tokenizer = load(arguments.folder)
        with _bar(shown=output is not None or not sys.stdout.isatty()) as bar:
            task = bar.add_task("prompts", total=len(requests))
            completions = generate(
                model,
                tokenizer,
                [request.prompt for request in requests],
                sampling,
                batch_size=arguments.batch_size,
                names=[request.name for request in requests],
                speed=speed,
                report=lambda count: bar.advance(task, count),
            )
            for request, made in zip(requests, completions, strict=True):
                write(request.line | {"text": made.text, "tokens": made.tokens, "finish": made.finish})
    return speed


def _print(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _bar(*, shown: bool) -> Progress:
    """Progress on a terminal, unless the results appear there themselves."""
    console = Console(file=sys.stderr)
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
        # rich would print what goes to standard output on the bar's console, past any > and |.
        redirect_stdout=False,
    )
