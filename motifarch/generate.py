"""`motifarch generate`: text from a Hugging Face folder, streamed as it is sampled."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import motifarch  # noqa: F401  # registers the Motif models
from motifarch.errors import UserError


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, ready to generate, on the GPU if there is one.

    Raises:
        UserError: the folder is missing or does not load.
    """
    if not (folder / "config.json").is_file():
        hint = f"; export it first: motifarch export {folder}" if (folder / "checkpoints").is_dir() else ""
        raise UserError(f"{folder} is no Hugging Face model folder (it has no config.json){hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} does not load: {str(error).strip().splitlines()[0]}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device=device).eval(), tokenizer  # type: ignore[call-arg]  # transformers hides its signature


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stream: bool = False,
) -> tuple[str, float]:
    """Sample a continuation.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: what to continue; an empty one starts a document.
        max_new_tokens: where to stop at the latest.
        temperature: 0 always takes the likeliest token.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the sampling.
        stream: print the prompt and each piece of text as it comes.

    Returns:
        The prompt and its continuation, and tokens per second (the prompt's pass included in the time).

    Raises:
        UserError: the prompt leaves no room within the model's positions.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids if prompt else torch.tensor([[tokenizer.eos_token_id]])
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < 1:
        raise UserError(
            f"the prompt has {ids.shape[1]} tokens but the model {model.config.max_position_embeddings} positions; "
            "shorten the prompt"
        )
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    started = time.perf_counter()
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(max_new_tokens, room),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
        **sampling,
    )
    seconds = time.perf_counter() - started
    return str(tokenizer.decode(output[0], skip_special_tokens=True)), (output.shape[1] - ids.shape[1]) / seconds


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`generate`."""
    parser = argparse.ArgumentParser(prog="motifarch generate", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="a folder that motifarch export wrote, or any causal language model's"
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: none, a new document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    arguments = parser.parse_args(argv)
    for name, value, accepted, holds in (
        ("--max-new-tokens", arguments.max_new_tokens, "at least 1", arguments.max_new_tokens >= 1),
        ("--temperature", arguments.temperature, "0 or more", arguments.temperature >= 0),
        ("--top-p", arguments.top_p, "above 0 and at most 1", 0 < arguments.top_p <= 1),
    ):
        if not holds:
            raise UserError(f"{name} is {value}; it must be {accepted}")
    model, tokenizer = load(arguments.folder)
    _, speed = generate(
        model,
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stream=True,
    )
    print(f"[{speed:.1f} tokens/s]", file=sys.stderr)
    return 0
