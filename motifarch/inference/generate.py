"""Text from a Hugging Face folder, streamed, or for many prompts."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
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
from motifarch.errors import UserError, first_line
from motifarch.inference.prompts import conversation, read_prompts, result_file
from motifarch.inference.sampling import Prompt, Sampling, Speed, generate, set_aside_settings
from motifarch.model_folder import CONFIG, GENERATION, check_json_files, explained, without_bars
from motifarch.progress import progress
from motifarch.weight_files import WeightFiles, file_names


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
    waiting = Console(stderr=True).status(f"loading the model of {folder}")
    with explained(f"the model of {folder}"), without_bars(), waiting:
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
    if aside := set_aside_settings(model, tokenizer):
        print(f"[{folder}/generation_config.json: {', '.join(aside)} set aside; the options decide]", file=sys.stderr)
    return model.to(device=device).eval(), tokenizer  # type: ignore[call-arg]  # transformers hides its signature


def run(arguments: argparse.Namespace) -> Speed:
    """Does what the options of ``motifarch generate`` say, and returns how fast it was.

    Raises:
        UserError: for anything that the user can mend.
    """
    sampling = Sampling(
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        arguments.cache,
        arguments.speculative,
    )
    return _one(arguments, sampling) if arguments.prompts is None else _many(arguments, sampling)


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
        apart = output is not None or not sys.stdout.isatty()  # from where the results appear
        with progress("prompts", len(requests), shown=apart) as advance:
            completions = generate(
                model,
                tokenizer,
                [request.prompt for request in requests],
                sampling,
                batch_size=arguments.batch_size,
                names=[request.name for request in requests],
                speed=speed,
                report=advance,
            )
            for request, made in zip(requests, completions, strict=True):
                write(request.line | {"text": made.text, "tokens": made.tokens, "finish": made.finish})
    return speed


def _print(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)
