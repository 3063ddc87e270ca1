"""How often `motifarch verify --against` is wrong: on independent models, on copies in disguise.

    python -m benchmarks.verify.similarity --work runs/similarity      # an hour on a core; goes on
    python -m benchmarks.verify.similarity --work runs/quick --models 4 --bases 4 --steps 20

Small models are trained from independent seeds on one text, the standard library's sources by
bytes: half with GDA and PolyNorm, half with softmax attention and SwiGLU. Independent ones are
compared pair by pair; what they have in common, they learned, and the limits of an alarm have to
lie above it. Disjoint pairs come first, then pairs drawn from all others, which share models.

Then each model is compared with what someone might make of it: a copy; one fine-tuned on other
text, pydoc's topics; a merge of 70% of it and 30% of an independent model, or of two fine-tunings;
and each in a disguise that keeps what the model computes, or all of it but the embeddings, which
may be another model's. Fine-tuning goes on until half of what the loss on the other text is above
its floor is gone; the floor is the loss of a model of the same layout trained on that text alone
for `--floor-steps` steps.
"""

import argparse
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from benchmarks.lib import cli, report
from benchmarks.verify.disguises import State, disguised, same_function
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.progress import progress
from motifarch.verify.similarity.compare import Comparer, Comparison
from motifarch.verify.similarity.limits import LIMITS
from motifarch.verify.similarity.parts import Model

LAYOUTS: dict[str, dict[str, Any]] = {
    "gda": {"attention_type": "gda", "num_attention_heads": 6, "num_noise_heads": 2, "num_key_value_heads": 4},
    "softmax": {"attention_type": "softmax", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"},
}
SHARED: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
SHARED |= {"initializer_range": 0.05}
BATCH, LENGTH, RATE = 8, 64, 1e-2
FILE = "model.safetensors"
EVERY = 5
"""Steps of fine-tuning between looks at the loss."""
SAVED = 50
"""Pairs between writes of what is known."""
MOVED = 1e-3
"""Most that a disguise may move logits, as a part of their spread: rounding."""
MOST = 400
"""Steps after which fine-tuning is given up."""
KINDS = ("copy", "fine-tuned", "merged with another", "merged of two fine-tuned", "fine-tuned for long")
REPLACED = "permuted, embeddings replaced"
DISGUISES = ("", "permuted and scaled", "rotated and scaled", REPLACED)
SETUP = ("models", "bases", "steps", "floor_steps", "pairs", "copies")
LONG = 4
"""Times as many steps as a model was trained for: to see where detection ends."""


def text(name: str) -> torch.Tensor:
    """Bytes (n,) of the standard library's modules ("code"), or of pydoc's topics ("topics")."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) if name == "code" else [root / "pydoc_data/topics.py"]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch(data: torch.Tensor, draw: torch.Generator, size: int = BATCH) -> torch.Tensor:
    """Sequences (size, LENGTH) from anywhere in a text."""
    starts = torch.randint(len(data) - LENGTH, (size, 1), generator=draw)
    return data[starts + torch.arange(LENGTH)].long()


def new_model(layout: str, seed: int) -> MotifForCausalLM:
    """A model with weights from a seed."""
    torch.manual_seed(seed)
    return MotifForCausalLM(MotifConfig(**SHARED, **LAYOUTS[layout]))


def train(model: MotifForCausalLM, data: torch.Tensor, steps: int, seed: int) -> Iterator[float]:
    """AdamW with a short warm-up and a linear decay; gives each step's loss before it is made."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 5) * (1 - step / steps)
        tokens = batch(data, draw)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_on(model: MotifForCausalLM, data: torch.Tensor) -> float:
    """The mean loss on sequences that are always the same."""
    tokens = batch(data, torch.Generator().manual_seed(0), 32)
    return float(model(input_ids=tokens, labels=tokens).loss)


def kept(folder: Path, make: Callable[[], tuple[State, dict[str, Any]]]) -> tuple[State, dict[str, Any]]:
    """Weights and what is noted of them; made unless the folder has them."""
    file, note = folder / FILE, folder / "note.json"
    if not note.is_file():
        state, about = make()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in state.items()}, file)
        note.write_text(json.dumps(about))
    return load_file(file), json.loads(note.read_text())


class Zoo:
    """The models, on disk."""

    def __init__(self, work: Path, steps: int, floor_steps: int) -> None:
        self.work = work
        self.code, self.topics = text("code"), text("topics")
        self._steps, self._floor_steps = steps, floor_steps

    def trained(self, layout: str, seed: int) -> Path:
        """A model from scratch."""
        folder = self.work / layout / str(seed)

        def make() -> tuple[State, dict[str, Any]]:
            model = new_model(layout, seed)
            losses = list(train(model, self.code, self._steps, seed))
            return model.state_dict(), {"first": losses[0], "loss": loss_on(model, self.code)}

        kept(folder, make)
        return folder

    def floor(self, layout: str) -> float:
        """The loss on the other text of a model that saw nothing else."""

        def make() -> tuple[State, dict[str, Any]]:
            model = new_model(layout, 10**6)
            list(train(model, self.topics, self._floor_steps, 10**6))
            return model.state_dict(), {"loss": loss_on(model, self.topics)}

        return float(kept(self.work / layout / "floor", make)[1]["loss"])

    def fine_tuned(self, layout: str, seed: int, variant: int = 0, *, long: bool = False) -> Path:
        """A model that went on with the other text until half of its loss above the floor was gone,
        or for long.
        """
        folder, floor = self.work / layout / f"{seed}_{'long' if long else 'tuned'}{variant}", self.floor(layout)

        def make() -> tuple[State, dict[str, Any]]:
            model = new_model(layout, seed)
            model.load_state_dict(load_file(self.trained(layout, seed) / FILE))
            start, most, step = loss_on(model, self.topics), LONG * self._steps if long else MOST, 0
            for step, _ in enumerate(train(model, self.topics, most, seed + 1000 * variant + 7)):
                if not long and step % EVERY == 0 and loss_on(model, self.topics) <= (start + floor) / 2:
                    break
            return model.state_dict(), {
                "start": start,
                "loss": loss_on(model, self.topics),
                "floor": floor,
                "steps": step,
            }

        kept(folder, make)
        return folder

    def derived(self, kind: str, layout: str, seed: int, variant: int, models: int) -> State:
        """What was made of a model."""
        long = kind == "fine-tuned for long"
        if kind in ("copy", "merged with another"):
            state = load_file(self.trained(layout, seed) / FILE)
        else:
            state = load_file(self.fine_tuned(layout, seed, variant, long=long) / FILE)
        if not kind.startswith("merged"):
            return state
        with_another = self.trained(layout, (seed + 1 + variant % (models - 1)) % models)
        other = load_file((with_another if kind.endswith("another") else self.fine_tuned(layout, seed)) / FILE)
        return {name: 0.7 * value + 0.3 * other[name] for name, value in state.items()}


def scores(comparison: Comparison) -> dict[str, Any]:
    """What a comparison of two one-part models gave."""
    (part,) = comparison.parts
    return {"alarm": part.alarm, "how": part.how, "score": part.score, "anchor": part.anchor, "ways": part.ways}


def interval(found: int, of: int) -> tuple[float, float]:
    """The exact 95% interval of a share (Clopper & Pearson 1934)."""
    low, high = binomtest(found, of).proportion_ci(0.95)
    return float(low), float(high)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All of it; what is there is not made again."""
    zoo = Zoo(options.work, options.steps, options.floor_steps)
    options.work.mkdir(parents=True, exist_ok=True)
    done = options.work / "compared.json"
    rows: dict[str, Any] = json.loads(done.read_text()) if done.is_file() else {}
    seeds = range(options.models)
    with progress("training", options.models * len(LAYOUTS), of="models") as advance:
        for layout in LAYOUTS:
            for seed in seeds:
                zoo.trained(layout, seed)
                advance()
    with progress("independent pairs", options.pairs, of="pairs") as advance:
        for layout, one, two in pairs(options.models, options.pairs):
            if (key := f"independent/{layout}/{one}/{two}") not in rows:
                comparer = Comparer(Model(zoo.trained(layout, one)))
                rows[key] = scores(comparer.compare(Model(zoo.trained(layout, two))))
                if len(rows) % SAVED == 0:
                    done.write_text(json.dumps(rows))
            advance()
    with progress("copies", options.copies, of="models") as advance:
        for i in range(options.copies):
            for kind in KINDS:
                # A second fine-tuning is there once all models have had one.
                if (kind == KINDS[3] and i < 2 * options.bases) or (kind == KINDS[4] and i >= options.long):
                    continue
                for disguise in DISGUISES:
                    if (key := f"{kind}/{disguise}/{i}") not in rows:
                        rows[key] = _derived(zoo, kind, disguise, i, options)
            done.write_text(json.dumps(rows))
            advance()
    tuned = [json.loads(file.read_text()) for file in options.work.glob("*/*_tuned*/note.json")]
    trained = [
        json.loads((zoo.trained(layout, seed) / "note.json").read_text()) for layout in LAYOUTS for seed in seeds
    ]
    return {"rows": rows, "tuned": tuned, "trained": trained}


def _derived(zoo: Zoo, kind: str, disguise: str, i: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a comparison says of the i-th model and what was made of it."""
    layout, seed, variant = list(LAYOUTS)[i % 2], (i // 2) % options.bases, i // (2 * options.bases)
    state = zoo.derived(kind, layout, seed, variant, options.bases)
    other = zoo.trained(layout, (seed + 1) % options.bases)
    state = in_disguise(state, layout, disguise, i, batch(zoo.code, torch.Generator().manual_seed(i), 2), other)
    folder = options.work / "suspect"
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / FILE)
    return scores(Comparer(Model(folder)).compare(Model(zoo.trained(layout, seed))))


def in_disguise(state: State, layout: str, disguise: str, seed: int, tokens: torch.Tensor, other: Path) -> State:
    """A model's weights in one of `DISGUISES`, drawn by a seed.

    Args:
        state: the weights.
        layout: the model's.
        disguise: which.
        seed: draws it.
        tokens: (B, S), on which logits have to stay what they were.
        other: the model that replaced embeddings are taken from.
    """
    if not disguise:
        return state
    model = new_model(layout, 0)
    model.load_state_dict(state)
    state = disguised(state, model.config, seed, rotate=disguise.startswith("rotated"))
    if (moved := same_function(model, state, tokens)) > MOVED:
        raise AssertionError(f"the disguise {disguise!r} moves the logits by {moved:.1e} of their spread")
    if disguise == REPLACED:
        others = load_file(other / FILE)
        state |= {name: others[name] for name in state if re.search("embed_tokens|lm_head", name)}
    return state


def pairs(models: int, wanted: int) -> list[tuple[str, int, int]]:
    """Pairs within a layout: disjoint ones first, then others in an order that is drawn."""
    first = [(layout, i, i + 1) for i in range(0, models - 1, 2) for layout in LAYOUTS]
    rest = [(layout, i, j) for layout in LAYOUTS for i, j in combinations(range(models), 2) if j != i + 1 or i % 2]
    order = np.random.default_rng(0).permutation(len(rest))
    return (first + [rest[i] for i in order])[:wanted]


def summary(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each kind: how many alarms, with the interval, and what likenesses were seen."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, row in rows.items():
        kind, disguise = key.split("/")[:2]
        groups.setdefault((kind, "" if kind == "independent" else disguise), []).append(row)
    found = []
    order = {(kind, disguise): i for i, (kind, disguise) in enumerate(product(("independent", *KINDS), DISGUISES))}
    for (kind, disguise), of in sorted(groups.items(), key=lambda group: order[group[0]]):
        ways = list(dict.fromkeys(way for row in of for way in row["ways"]))  # graphs are not always matched
        alarms = sum(row["alarm"] for row in of)
        pick = max if kind == "independent" else min
        found.append(
            {"kind": kind, "disguise": disguise, "compared": len(of), "alarms": alarms}
            | {"interval": interval(alarms, len(of))}
            | {"extreme": {way: pick(row["ways"][way][0] for row in of if way in row["ways"]) for way in ways}}
            | {
                "extreme_anchor": {
                    way: pick(row["ways"][way][1] or 0.0 for row in of if way in row["ways"]) for way in ways
                }
            }
            # The best of the ways, which is what decides.
            | {"layers": [round(max(way[0] for way in row["ways"].values()), 4) for row in of]}
            | {"embeddings": [round(max(way[1] or 0.0 for way in row["ways"].values()), 4) for row in of]}
        )
    return found


def draw(groups: list[dict[str, Any]], path: Path) -> None:
    """How alike layers and embeddings are, a line of points for each kind."""
    figure, axes = report.figure(1, 2, size=(13, 0.42 * len(groups) + 1.6))
    for axis, of, name in zip(axes.flat, ("layers", "embeddings"), ("layers", "embeddings, held out"), strict=True):
        for at, group in enumerate(groups):
            colour = report.COLOURS[4] if group["kind"] == "independent" else report.COLOURS[0]
            jitter = np.random.default_rng(at).uniform(-0.3, 0.3, len(group[of]))
            axis.scatter(group[of], -at + jitter, s=5, color=colour, alpha=0.5, linewidths=0)
        limit = LIMITS.layers if of == "layers" else LIMITS.anchor
        axis.axvline(limit, color="black", linewidth=1, linestyle="--")
        axis.text(limit + 0.01, 0.9, "alarm", fontsize=9, va="center")
        axis.set_xlim(-0.05, 1.05)
        axis.set_ylim(-len(groups) + 0.3, 1.3)
        axis.set_xlabel("the most alike layer" if of == "layers" else name)
        labels = [f"{title(g)} ({g['compared']})" for g in groups]
        axis.set_yticks([-at for at in range(len(groups))], labels if of == "layers" else [""] * len(groups))
        axis.grid(axis="x", alpha=0.25)
    report.write_plot(path, figure)


def print_table(groups: list[dict[str, Any]], console: Console) -> None:
    """Alarms by kind."""
    lines = [
        (
            title(g),
            f"{g['alarms']} of {g['compared']}",
            "{:.1%} - {:.1%}".format(*g["interval"]),
            f"{min(g['layers']):.2f} - {max(g['layers']):.2f}",
            f"{min(g['embeddings']):.2f} - {max(g['embeddings']):.2f}",
        )
        for g in groups
    ]
    columns = ["", "alarms", "95% interval", "layers", "embeddings"]
    console.print(report.table("Comparisons of small models", columns, lines))


def title(row: dict[str, Any]) -> str:
    """A kind and its disguise, in words."""
    return f"{row['kind']}{', ' * bool(row['disguise'])}{row['disguise']}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the models and their pairs."""
    add = parser.add_argument
    add("--work", type=Path, default=report.ROOT / "runs/similarity", help="models and what was compared, to go on")
    add("--models", type=int, default=200, help="trained of each layout; default %(default)s")
    add("--bases", type=int, default=50, help="those of which others are made; default %(default)s")
    add("--steps", type=int, default=60, help="of training; default %(default)s")
    add("--floor-steps", type=int, default=600, help="of the floor's model; default %(default)s")
    add("--pairs", type=int, default=1000, help="of independent models; default %(default)s")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = cli.bare_parser("benchmarks.verify.similarity", __doc__)
    add_options(parser)
    add = parser.add_argument
    add("--copies", type=int, default=200, help="models of which something is made; default %(default)s")
    add("--long", type=int, default=10, help="of which so many are fine-tuned for long; default %(default)s")
    add("--output", type=Path, default=report.RESULTS / "similarity.json", help="JSON, a plot beside it")
    options = parser.parse_args(argv)
    console = Console()

    def run() -> int:
        for name in SETUP:
            if getattr(options, name) < 2:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 2")
        if options.bases > options.models:
            raise UserError(f"--bases is {options.bases}; accepted: no more than --models, {options.models}")
        torch.set_num_threads(1)
        env = cli.introduce("benchmarks.verify.similarity", torch.device("cpu"), ("torch", "scipy"), console)
        found = measure(options, console)
        groups = summary(found.pop("rows"))
        print_table(groups, console)
        setup = {name: getattr(options, name) for name in SETUP}
        report.write_json(
            options.output,
            {"environment": env, "setup": setup, "limits": vars(LIMITS), "rows": groups} | _losses(found),
        )
        draw(groups, options.output.with_suffix(".png"))
        return 0

    return cli.resumed_status(run)


def _losses(found: dict[str, Any]) -> dict[str, Any]:
    """Medians of the losses, before and after."""
    return {
        which: {name: float(np.median([note[name] for note in notes])) for name in notes[0]}
        for which, notes in found.items()
        if notes
    }


if __name__ == "__main__":
    sys.exit(main())
