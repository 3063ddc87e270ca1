"""Tokens per second of `generate` on caches that hold a prompt already, models taking turns."""

from __future__ import annotations

import copy
import dataclasses
import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks.contenders import CONTENDERS, Entry, Sizes
from benchmarks.kernels import DTYPES
from benchmarks.lib import report
from benchmarks.timing import CpuClock, Work, time_in_turns
from motifarch.errors import UserError

CACHES = ("static", "dynamic")
MODELS = ("gda", "gda_narrow", "diff_v1", "softmax", "diffllama_sdpa", "diffllama_eager", "llama")
DIFFERENTIAL = ("gda", "gda_narrow", "diff_v1")
DIFFLLAMA = ("diffllama_sdpa", "diffllama_eager")

# The prompt goes through the models so many tokens at a time: eager attention maps of a long one
# would fill the memory.
_PROMPT_PART = 256


@dataclass(frozen=True)
class Cell:
    """One size."""

    precision: str
    """In :data:`benchmarks.kernels.DTYPES`."""
    batch: int
    context: int
    """Tokens of the prompt."""

    @classmethod
    def parse(cls, text: str) -> Cell:
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


CPU_CELLS = tuple(
    Cell.parse(text)
    for text in ("float32:1x512", "float32:1x4096", "float32:8x512", "float32:8x2048", "bf16:1x512", "bf16:8x512")
)
QUICK_CELLS = (Cell("float32", 2, 40), Cell("bf16", 1, 40))


@dataclass(frozen=True)
class Setup:
    """How every model is run."""

    sizes: Sizes
    new_tokens: int
    cache: str
    """In :data:`CACHES`."""
    rounds: int
    device: str
    """"cpu" or "cuda"."""

    def build(self, entry: Entry, precision: str) -> PreTrainedModel:
        """The model in evaluation mode, weights random; ours choose their attention for a GPU
        themselves.
        """
        torch.manual_seed(0)
        contender = entry.contender
        with torch.device(self.device):
            if self.device == "cuda" and contender.library == "motifarch":
                contender = dataclasses.replace(contender, attention="auto")
            model = contender.build(self.sizes, entry.intermediate_size)
        return model.to(dtype=DTYPES[precision]).eval()  # type: ignore[call-arg]  # transformers hides its signature


class Decoder:
    """A model and a prompt that its cache holds; a call generates from there.

    Args:
        model: whose.
        cell: the size of the prompt.
        setup: how many tokens, and which cache.
    """

    def __init__(self, model: PreTrainedModel, cell: Cell, setup: Setup):
        self.model, self.cell, self.setup = model, cell, setup
        generator = torch.Generator().manual_seed(0)
        # One more than is cached: generate always has a token to begin with.
        shape = (cell.batch, cell.context + 1)
        self.ids = torch.randint(setup.sizes.vocab_size, shape, generator=generator).to(setup.device)
        if setup.cache == "static":
            self.cache: Any = StaticCache(config=model.config, max_cache_len=cell.context + setup.new_tokens)
        else:
            self.cache = DynamicCache(config=model.config)
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
        """The prompt and ``new_tokens`` more, (B, context + 1 + new_tokens), done when it returns.

        Raises:
            UserError: it stopped early.
        """
        new = self.setup.new_tokens
        model: Any = self.model
        out: Tensor = model.generate(
            self.ids,
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
            disable_compile=True,
        )
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
        if out.shape != (self.cell.batch, self.cell.context + 1 + new):
            raise UserError(f"generate gave {tuple(out.shape)} tokens instead of {new} new ones for each row")
        return out


def measure(
    cell: Cell, models: Mapping[str, PreTrainedModel], setup: Setup, show: Callable[[str, str], None]
) -> list[dict[str, Any]]:
    """Time the models at one size, taking turns.

    Args:
        cell: the size.
        models: by the contenders' names, on the device and in the precision.
        setup: how they are run.
        show: told what is done and with which model.

    Returns:
        A result for each model.
    """
    decoders = {}
    for name, model in models.items():
        show("prompt", name)
        decoders[name] = Decoder(model, cell, setup)

    def work(name: str, decoder: Decoder) -> Work:
        def prepare() -> Any:
            show("generate", name)
            return decoder.prepare()

        return Work(decoder, prepare=prepare)

    # A generate call is the host's work as much as the device's: wall time on a GPU too.
    rounds = setup.rounds
    turns = {name: {"": work(name, decoder)} for name, decoder in decoders.items()}
    timings = time_in_turns(turns, CpuClock(), seconds=0, minimum=rounds, maximum=rounds)
    tokens, results = cell.batch * setup.new_tokens, []
    for name, decoder in decoders.items():
        seconds = [t.seconds for t in timings[name][""]]
        results.append(
            dataclasses.asdict(cell)
            | {
                "model": name,
                "tokens_per_second": report.spread([tokens / s for s in seconds])._asdict(),
                "seconds": seconds,
                "cache_bytes_per_token": decoder.cache_bytes_per_token,
            }
        )
    return results


def measure_all(
    cells: Sequence[Cell],
    entries: Mapping[str, Entry],
    setup: Setup,
    *,
    show: Callable[[str, str], None],
    keep: Callable[[Cell, list[dict[str, Any]]], None],
) -> None:
    """Measure all cells; the models of a precision are built once and stay until another one's
    turn.

    Args:
        cells: the sizes, in order.
        entries: the models.
        setup: how they are run.
        show: told what is done and with which model.
        keep: given each cell's results as they come.
    """
    models: dict[str, PreTrainedModel] = {}
    precision = None
    for cell in cells:
        if cell.precision != precision:
            models.clear()
            gc.collect()
            precision = cell.precision
            for name, entry in entries.items():
                show("build", name)
                models[name] = setup.build(entry, precision)
        keep(cell, measure(cell, models, setup, show))


def judge(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold our differential models to the aim at each size: 1.3 times DiffLlama, the faster of its
    attentions.
    """
    judged = []
    sizes = dict.fromkeys((r["precision"], r["batch"], r["context"]) for r in results)
    for precision, batch, context in sizes:
        found = {
            r["model"]: r["tokens_per_second"]["median"]
            for r in results
            if (r["precision"], r["batch"], r["context"]) == (precision, batch, context)
        }
        rivals = [name for name in DIFFLLAMA if name in found]
        if not rivals:
            continue
        rival = max(rivals, key=found.__getitem__)
        for name in DIFFERENTIAL:
            if name in found:
                ratio = found[name] / found[rival]
                judged.append(
                    {
                        "part": "generate",
                        "aim": f"{CONTENDERS[name].label}: at least 1.3 times DiffLlama's tokens per second",
                        "model": name,
                        "rival": rival,
                        "precision": precision,
                        "batch": batch,
                        "context": context,
                        "bound": 1.3,
                        "ratio": ratio,
                        "met": ratio >= 1.3,
                    }
                )
    return judged
