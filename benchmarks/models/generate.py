"""Tokens per second of transformers' generate, beside DiffLlama and Llama.

    python -m benchmarks.models.generate                     # on two cores, some ten minutes
    python -m benchmarks.models.generate --cells float32:8x512 --cache dynamic
    python -m benchmarks.models.generate --quick             # a smoke test

Greedy, a fixed number of new tokens, random weights and prompts. The models have equal hidden size,
layers and head_dim, and equal numbers of parameters to 3% (providers.py). The prompt is in the
cache before the clock starts: each call gets a copy of it, and its time is that of new tokens
alone. Nothing is compiled. Models take turns, a call each, in an order that rotates. Tokens per
second are of all rows together: the median, with the middle half. A call is the host's work as much
as the device's, so the clock is the host's on a GPU too.
"""

import argparse
import contextlib
import copy
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks.lib import cli, report
from benchmarks.lib.bench import DTYPES, Work, time_side_by_side
from benchmarks.models import report as models_report
from benchmarks.models.providers import DIFFLLAMAS, PROVIDERS, MatchedModel, Sizes, choose, match_parameters
from motifarch.errors import UserError

MODULE = "benchmarks.models.generate"
PACKAGES = ("motifarch", "torch", "transformers", "triton")
CACHES = ("static", "dynamic")
MODELS = ("gda", "gda_narrow", "diff_v1", "softmax", *DIFFLLAMAS, "llama")
DIFFERENTIAL = ("gda", "gda_narrow", "diff_v1")
AIMS = (models_report.Aim("DiffLlama", models_report.SPEED, 1.3),)
# The prompt goes through the models so many tokens at a time: the eager attention maps of a long
# one would fill the memory.
_PROMPT_PART = 256


class Cell(NamedTuple):
    """One size."""

    precision: str
    batch: int
    context: int
    """Tokens of the prompt."""

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """From "PRECISION:BATCHxCONTEXT", as on the command line.

        Raises:
            UserError: it is something else.
        """
        found = re.fullmatch(r"(\w+):(\d+)x(\d+)", text)
        if not found or found[1] not in DTYPES or int(found[2]) < 1 or int(found[3]) < 2:
            raise UserError(
                f"--cells {text} is not PRECISION:BATCHxCONTEXT, such as float32:8x512, with a precision of "
                f"{' or '.join(DTYPES)}, at least one row and at least two tokens"
            )
        return cls(found[1], int(found[2]), int(found[3]))

    def describe(self) -> str:
        """In words."""
        return f"{self.precision}, {self.batch} x {self.context:,}"


CELLS = ["float32:1x512", "float32:1x4096", "float32:8x512", "float32:8x2048", "bf16:1x512", "bf16:8x512"]
QUICK_CELLS = ("float32:2x40", "bf16:1x40")


class Decoder:
    """A model and a prompt that its cache holds; a call generates from there."""

    def __init__(self, model: PreTrainedModel, cell: Cell, new_tokens: int, cache: str):
        self.model, self.cell, self.new_tokens = model, cell, new_tokens
        generator = torch.Generator().manual_seed(0)
        # One more than is cached: generate always has a token to begin with.
        shape = (cell.batch, cell.context + 1)
        self.ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
        static: dict[str, Any] = {"max_cache_len": cell.context + new_tokens}
        self.cache: Any = (
            StaticCache(config=model.config, **static) if cache == "static" else DynamicCache(config=model.config)
        )
        with torch.no_grad():
            for part in self.ids[:, : cell.context].split(_PROMPT_PART, dim=1):
                model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @property
    def cache_bytes_per_token(self) -> int:
        """What a token of a row takes in the cache, over all layers."""
        tensors = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.nbytes for t in tensors) // (tensors[0].shape[0] * tensors[0].shape[2])

    def prepare(self) -> Any:
        """A cache of its own for a call, which writes into it."""
        return copy.deepcopy(self.cache)

    def __call__(self, cache: Any) -> Tensor:
        """The prompt and the new tokens, (B, context + 1 + new_tokens), done when it returns.

        Raises:
            UserError: it stopped early.
        """
        new, model = self.new_tokens, self.model
        out: Tensor = model.generate(  # type: ignore[operator]
            self.ids,
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
            disable_compile=True,
        )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        if out.shape != (self.cell.batch, self.cell.context + 1 + new):
            raise UserError(f"generate gave {tuple(out.shape)} tokens instead of {new} new ones for each row")
        return out


def build(matched: MatchedModel, sizes: Sizes, precision: str, device: str) -> PreTrainedModel:
    """The model in evaluation mode, with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = matched.build(sizes)
    return model.to(dtype=DTYPES[precision]).eval()  # type: ignore[call-arg]  # transformers hides its signature


def _wall_clock(function: Callable[[], object], _: float) -> list[float]:
    began = time.perf_counter()
    function()
    return [time.perf_counter() - began]


def measure(cell: Cell, models: Mapping[str, PreTrainedModel], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A result for each model at one size."""
    decoders = {name: Decoder(model, cell, arguments.new_tokens, arguments.cache) for name, model in models.items()}
    works = {name: {"": Work(decoder, prepare=decoder.prepare)} for name, decoder in decoders.items()}
    rounds = arguments.rounds + 1  # the first is a warm-up
    timings = time_side_by_side(works, _wall_clock, seconds=0, rounds=rounds, most_rounds=rounds)
    for name, reason in timings.failed.items():
        raise UserError(f"{PROVIDERS[name].label} at {cell.describe()}: {reason}; leave it out of --models")
    tokens, results = cell.batch * arguments.new_tokens, []
    for name, decoder in decoders.items():
        seconds = timings.seconds[name][""][1:]
        results.append(
            {
                **cell._asdict(),
                "model": name,
                "tokens_per_second": report.spread([tokens / s for s in seconds])._asdict(),
                "seconds": seconds,
                "cache_bytes_per_token": decoder.cache_bytes_per_token,
            }
        )
    return results


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(MODULE, __doc__)
    add = made.add_argument
    add("--cells", nargs="+", metavar="PRECISION:BATCHxCONTEXT", help=f"default: {' '.join(CELLS)}")
    add("--models", nargs="+", choices=list(PROVIDERS), metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    add("--new-tokens", type=int, help="of a call; default 32")
    add("--rounds", type=int, help="timed calls of each model at each size; default 7")
    add("--cache", choices=CACHES, default="static", help="default: %(default)s, for all models")
    return made


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and report; the exit status: 1 if it was stopped before the end.

    Raises:
        UserError: an option has no meaning, or a model that was asked for cannot run here.
    """
    device = cli.resolve_device(arguments, ("new_tokens", "rounds"))
    quick = arguments.quick
    arguments.new_tokens = arguments.new_tokens or (4 if quick else 32)
    arguments.rounds = arguments.rounds or (2 if quick else 7)
    cells = [Cell.parse(text) for text in arguments.cells or (QUICK_CELLS if quick else CELLS)]
    names, _ = choose(arguments.models, MODELS, device.type)
    positions = max(c.context for c in cells) + arguments.new_tokens + 1
    sizes = Sizes(128, 2, 16, 256, 352, 8, positions) if quick else Sizes(max_positions=positions)
    matched = match_parameters(names, sizes)
    env = cli.introduce(MODULE, device, PACKAGES, console)
    settings = ("threads", "device", "quick", "new_tokens", "rounds", "cache")
    content: dict[str, Any] = {
        "benchmark": "generate",
        "format": 1,
        "complete": False,
        "environment": env,
        "settings": {name: getattr(arguments, name) for name in settings},
        "aims": [],
        "sizes": vars(sizes),
        "models": [m.describe() for m in matched.values()],
        "results": [],
    }
    path = cli.results_path("generate", arguments, device)
    with contextlib.suppress(KeyboardInterrupt), cli.terminate_as_interrupt():
        for precision in dict.fromkeys(cell.precision for cell in cells):
            models = {name: build(m, sizes, precision, device.type) for name, m in matched.items()}
            for cell in cells:
                if cell.precision == precision:
                    console.print(f"generate, {cell.describe()}")
                    content["results"] += measure(cell, models, arguments)
                    report.write_json(path, content)
            models.clear()
            gc.collect()
        content["complete"] = True
    content["aims"] = [] if quick else models_report.judge(content["results"], DIFFERENTIAL, AIMS)
    report.write_json(path, content)
    models_report.print_models(console, content["models"])
    kib = {"cache KiB\nper token": lambda r: f"{r['cache_bytes_per_token'] / 1024:,.2f}"}
    models_report.print_cells(console, content["results"], kib)
    models_report.print_aims(console, content["aims"])
    console.print(f"figures: {path}", soft_wrap=True)
    if content["results"]:
        title = f"generate after the prompt, {arguments.cache} cache, batch x prompt"
        models_report.draw(path.with_suffix(".png"), content, title)
        console.print(f"plot: {path.with_suffix('.png')}", soft_wrap=True)
    return int(not content["complete"])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: run(parser().parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
