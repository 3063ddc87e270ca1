"""Tokens per second and peak memory of a full training step, ours against transformers' DiffLlama and Llama.

    python -m benchmarks.train_step                      # about ten minutes on two cores
    python -m benchmarks.train_step --quick              # a smoke test of a minute, with no meaning
    python -m benchmarks.train_step --profile gda        # where one model's step goes, operator by operator

A step is forward, loss, backward, gradient clipping, AdamW (torch's fused one) and zero_grad, over random tokens. The
models have equal hidden size, layers and head width, and equal numbers of parameters to 3% (see contenders.py). Each
takes its loss its own way, as its users get it: transformers' models from whole logits, ours in chunks.

Every model is trained as motifarch's own loop trains: FSDP2 on a world of one, float32 master weights, and bfloat16
copies of them for the work where the precision is bf16. With ``--autocast``, plain modules under ``torch.autocast``
instead.

*Speed.* All models are in memory together and take turns, a step each, in an order that rotates from round to round, so
that a drift of the machine's speed hits all alike. The figure is the median round, with the quartiles beside it.

*Memory.* Each model, length and precision has a fresh process. On a CPU it counts what the process's resident set
rises, at its highest, above what it was before the model was built: weights, gradients, optimizer states, activations,
work space, and what the allocator keeps. Libraries loaded on first use are not in it: a tiny model of the same kind
takes a step first. On a GPU it is ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.contenders import CONTENDERS, Entry, Sizes, match_parameters
from benchmarks.training import DTYPES, Setup, TrainStep, peak_memory, time_rounds
from motifarch.errors import UserError

MODULE = "benchmarks.train_step"
PACKAGES = ("motifarch", "torch", "transformers")
GDA = ("gda", "gda_narrow")
DIFFLLAMA = ("diffllama_sdpa", "diffllama_eager")
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Aim:
    """What a GDA 4:1 is meant to reach at a length: a ratio to a rival's figure."""

    rival: str
    seq_len: int
    measure: str
    """"tokens_per_second" (at least) or "peak_memory_bytes" (below)."""
    bound: float

    def describe(self, model: str) -> str:
        """In words."""
        ours = CONTENDERS[model].label
        rival = "DiffLlama" if self.rival == "diffllama" else CONTENDERS[self.rival].label
        if self.measure == "tokens_per_second":
            return f"{ours}: speed at {self.seq_len} tokens is at least {self.bound:g} of {rival}'s"
        return f"{ours}: peak memory at {self.seq_len} tokens is below {rival}'s"


AIMS = (
    Aim("diffllama", 512, "tokens_per_second", 1.0),
    Aim("diffllama", 2048, "tokens_per_second", 1.2),
    Aim("llama", 512, "tokens_per_second", 0.85),
    Aim("diffllama", 512, "peak_memory_bytes", 1.0),
    Aim("diffllama", 2048, "peak_memory_bytes", 1.0),
)


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold measured results to the aims, one entry for each aim and precision that was measured.

    DiffLlama stands for the faster of its attentions, in speed and in memory.
    """
    cells = {(r["precision"], r["seq_len"], r["model"]): r for r in results}
    judged = []
    for precision, model in itertools.product(dict.fromkeys(r["precision"] for r in results), GDA):
        for aim in AIMS:
            ours = cells.get((precision, aim.seq_len, model))
            names = DIFFLLAMA if aim.rival == "diffllama" else (aim.rival,)
            rivals = [cells[key] for name in names if (key := (precision, aim.seq_len, name)) in cells]
            if ours is None or not rivals:
                continue
            rival = max(rivals, key=lambda r: r["tokens_per_second"]["median"])
            if aim.measure == "tokens_per_second":
                ratio = ours[aim.measure]["median"] / rival[aim.measure]["median"]
                met = ratio >= aim.bound
            else:
                ratio = ours[aim.measure] / rival[aim.measure]
                met = ratio < aim.bound
            judged.append(
                {
                    "aim": aim.describe(model),
                    "precision": precision,
                    "seq_len": aim.seq_len,
                    "model": model,
                    "rival": rival["model"],
                    "measure": aim.measure,
                    "bound": aim.bound,
                    "ratio": ratio,
                    "met": met,
                }
            )
    return judged


def measure(
    setup: Setup, entries: dict[str, Entry], arguments: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """All figures, one dictionary for each precision, length and model."""
    cells = [(p, s, name) for p in arguments.precisions for s in arguments.seq_lens for name in entries]
    seconds: dict[tuple[str, int, str], list[float]] = {}
    peaks: dict[tuple[str, int, str], int] = {}
    total = len(cells) * (arguments.warmup + arguments.rounds + 1)
    with report.progress(console) as bar:
        task = bar.add_task("", total=total)
        begun = itertools.count()

        def show(what: str, name: str) -> None:
            bar.update(task, completed=next(begun), description=f"{what}: {CONTENDERS[name].label}")

        def announce(what: str) -> str:
            # A log file shows no bar while it moves.
            if not console.is_terminal:
                console.print(what)
            return what

        # Memory first: the fork server is then made by a process that has no model and no threads of its own yet.
        for (precision, seq_len), group in itertools.groupby(cells, key=lambda cell: cell[:2]):
            what = announce(f"memory, {precision}, {seq_len} tokens")
            for _, _, name in group:
                show(what, name)
                peaks[precision, seq_len, name] = peak_memory(
                    entries[name], setup, precision, seq_len, arguments.memory_steps
                )
        for precision in arguments.precisions:
            with setup.world():
                steps = {name: TrainStep(entry, setup, precision) for name, entry in entries.items()}
                for seq_len in arguments.seq_lens:
                    timed = time_rounds(
                        steps,
                        setup.batch(seq_len),
                        rounds=arguments.rounds,
                        warmup=arguments.warmup,
                        on_step=partial(show, announce(f"speed, {precision}, {seq_len} tokens")),
                    )
                    seconds |= {(precision, seq_len, name): values for name, values in timed.items()}
                del steps
                gc.collect()
        bar.update(task, completed=total, description="measured")
    results = []
    for precision, seq_len, name in cells:
        values = seconds[precision, seq_len, name]
        tokens = setup.batch(seq_len).numel()
        results.append(
            {
                "model": name,
                "precision": precision,
                "seq_len": seq_len,
                "tokens_per_step": tokens,
                "tokens_per_second": report.spread([tokens / s for s in values])._asdict(),
                "seconds": values,
                "peak_memory_bytes": peaks[precision, seq_len, name],
            }
        )
    return results


def print_results(console: Console, content: dict[str, Any]) -> None:
    """The tables: one of the models, one for each precision and length, and the aims."""
    labels = {m["name"]: m["label"] for m in content["models"]}
    console.print(
        report.table(
            "Models",
            ("model", "library", "attention", "MLP", "MLP\nwidth", "parameters", "of\nLlama"),
            [
                (
                    *(m["label"], m["library"], m["attention"], m["feed_forward"]),
                    *(f"{m['intermediate_size']:,}", f"{m['parameters']:,}", f"{m['relative_parameters']:.3f}"),
                )
                for m in content["models"]
            ],
            text_columns=4,
        )
    )
    results = content["results"]
    for precision, seq_len in dict.fromkeys((r["precision"], r["seq_len"]) for r in results):
        cell = {r["model"]: r for r in results if (r["precision"], r["seq_len"]) == (precision, seq_len)}
        speed = {name: r["tokens_per_second"]["median"] for name, r in cell.items()}
        fastest = max((name for name in DIFFLLAMA if name in cell), key=speed.__getitem__, default=None)

        def over(name: str | None, value: float, figures: dict[str, float]) -> str:
            return f"{value / figures[name]:.2f}" if name in figures else "-"

        memory = {name: r["peak_memory_bytes"] for name, r in cell.items()}
        rows = [
            (
                labels[name],
                f"{speed[name]:,.0f}",
                f"±{50 * (r['tokens_per_second']['upper'] - r['tokens_per_second']['lower']) / speed[name]:.1f}%",
                *(over("llama", speed[name], speed), over(fastest, speed[name], speed)),
                f"{memory[name] / MEBIBYTE:,.0f}",
                *(over("llama", memory[name], memory), over(fastest, memory[name], memory)),
            )
            for name, r in cell.items()
        ]
        headings = ["model", "tokens\nper s", "middle\nhalf", "of\nLlama", "of Diff-\nLlama"]
        headings += ["peak\nMiB", "of\nLlama", "of Diff-\nLlama"]
        console.print(report.table(f"{precision}, sequences of {seq_len} tokens", headings, rows))
    for aim in content["aims"]:
        verdict = "[green]met[/green]    " if aim["met"] else "[red]not met[/red]"
        rival = f", against {labels[aim['rival']]}" if aim["rival"] in DIFFLLAMA else ""
        console.print(
            f"{verdict}  {aim['precision']:<8} {aim['aim']}: [bold]{aim['ratio']:.3f}[/bold]{rival}", soft_wrap=True
        )
    if not content["aims"]:
        console.print("No aim was judged: that takes a full run with a GDA and its rivals at 512 or 2,048 tokens.")


def draw(path: Path, content: dict[str, Any]) -> None:
    """The picture: speed relative to Llama (without it, to the first model) and peak memory, a row a precision."""
    labels = {m["name"]: m["label"] for m in content["models"]}
    base = "llama" if "llama" in labels else next(iter(labels))
    colours = dict(zip(labels.values(), report.COLOURS, strict=False)) | {labels[base]: report.GREY}
    cells = {(r["precision"], r["seq_len"], r["model"]): r for r in content["results"]}
    precisions, seq_lens = (list(dict.fromkeys(r[key] for r in content["results"])) for key in ("precision", "seq_len"))
    groups = [f"{s:,} tokens" for s in seq_lens]
    figure, axes = report.figure(len(precisions), 2, size=(13, 1.2 + 3.4 * len(precisions)))
    for precision, (left, right) in zip(precisions, axes, strict=True):
        reference = {s: cells[precision, s, base]["tokens_per_second"]["median"] for s in seq_lens}
        speed, ends, memory = {}, {}, {}
        for name, label in labels.items():
            row = [cells[precision, s, name] for s in seq_lens]
            per_second = [{k: v / reference[r["seq_len"]] for k, v in r["tokens_per_second"].items()} for r in row]
            speed[label] = [p["median"] for p in per_second]
            ends[label] = [(p["lower"], p["upper"]) for p in per_second]
            memory[label] = [r["peak_memory_bytes"] / (1 << 30) for r in row]
        report.grouped_bars(left, groups, speed, colours=colours, errors=ends, reference=1.0)
        left.set_ylabel(f"tokens/s relative to {labels[base]}")
        left.set_title(f"{precision}: speed (whiskers: middle half of rounds)", fontsize=10)
        report.grouped_bars(right, groups, memory, colours=colours)
        right.set_ylabel("peak memory (GiB)")
        right.set_title(f"{precision}: memory", fontsize=10)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    figure.suptitle("A full training step at equal parameters\n" + report.describe(content["environment"]), fontsize=11)
    report.write_picture(path, figure)


def print_profile(
    setup: Setup, entry: Entry, precisions: list[str], seq_lens: list[int], steps: int, console: Console
) -> None:
    """The operators that one model's step spends its time in, by their own time without the operators they call."""
    cuda = setup.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for precision in precisions:
        with setup.world():
            step = TrainStep(entry, setup, precision)
            for seq_len in seq_lens:
                batch = setup.batch(seq_len)
                for _ in range(2):
                    step(batch)
                with profile(activities=activities) as profiler:
                    for _ in range(steps):
                        step(batch)
                console.rule(f"{entry.contender.label}, {precision}, {seq_len} tokens, {steps} steps")
                order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
                # Longer than a console is wide: printed as it is.
                print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=64))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, *_, counted = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=summary,
        epilog=counted,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = Sizes()
    add = parser.add_argument
    names = ", ".join(CONTENDERS)
    add("--models", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="MODEL", help=f"of {names}")
    add("--seq-lens", nargs="+", type=int, help="tokens of a row; default 512 2048")
    add("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: all")
    add("--tokens-per-step", type=int, help="tokens of a batch, at every length; default 2048")
    add("--rounds", type=int, help="timed steps of each model; default 9")
    add("--warmup", type=int, help="untimed steps of each model before them; default 2")
    add("--memory-steps", type=int, default=3, help="steps in which peak memory is sought; default 3")
    add("--hidden-size", type=int, default=sizes.hidden_size, help="default %(default)s")
    add("--layers", type=int, default=sizes.num_layers, help="default %(default)s")
    add("--head-dim", type=int, default=sizes.head_dim, help="default %(default)s")
    add("--vocab-size", type=int, default=sizes.vocab_size, help="default %(default)s")
    add("--intermediate-size", type=int, help="Llama's feed-forward width; default 1408 or 11/4 of the hidden size")
    add("--gda-heads", type=int, help="query heads of the first GDA; default 5/4 of Llama's, as in Motif-2-12.7B")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--autocast", action="store_true", help="bf16 by torch.autocast on plain modules, without FSDP2")
    add(
        "--output",
        type=Path,
        help="JSON file, a picture beside it; default benchmarks/results/train_step_DEVICE.json",
    )
    add("--quick", action="store_true", help="tiny models, a smoke test; writes to runs/ unless told otherwise")
    add("--profile", choices=list(CONTENDERS), metavar="MODEL", help="print one model's top operators, measure nothing")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.seq_lens = arguments.seq_lens or ([16, 64] if quick else [512, 2048])
    arguments.tokens_per_step = arguments.tokens_per_step or (64 if quick else 2048)
    arguments.rounds = arguments.rounds or (3 if quick else 9)
    arguments.warmup = arguments.warmup if arguments.warmup is not None else (1 if quick else 2)
    arguments.models = list(dict.fromkeys(arguments.models))
    if arguments.profile:
        arguments.models = [arguments.profile]
    return arguments


def _sizes(arguments: argparse.Namespace) -> Sizes:
    if arguments.quick:
        return Sizes(128, 2, 16, 256, 352, 8, max(arguments.seq_lens), arguments.gda_heads)
    width = arguments.intermediate_size or arguments.hidden_size * 11 // 4
    return Sizes(
        hidden_size=arguments.hidden_size,
        num_layers=arguments.layers,
        head_dim=arguments.head_dim,
        vocab_size=arguments.vocab_size,
        intermediate_size=width,
        max_positions=max(arguments.seq_lens),
        gda_heads=arguments.gda_heads,
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure and report as the command line asks.

    Raises:
        UserError: sizes that no model can have, or lengths that do not divide the batch.
    """
    for seq_len in arguments.seq_lens:
        if seq_len < 2 or arguments.tokens_per_step % seq_len:
            raise UserError(
                f"--tokens-per-step {arguments.tokens_per_step} is not a whole number of rows of {seq_len} tokens; "
                "all lengths must have batches of the same tokens, so choose a multiple of each of --seq-lens"
            )
    for name in ("rounds", "memory_steps", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    setup = Setup(_sizes(arguments), arguments.tokens_per_step, device, arguments.threads, arguments.autocast)
    entries = match_parameters(arguments.models, setup.sizes)
    if arguments.profile:
        entry = entries[arguments.profile]
        print_profile(setup, entry, arguments.precisions, arguments.seq_lens, arguments.rounds, console)
        return
    env = report.environment(MODULE, torch.device(device), PACKAGES)
    console.print(report.describe(env), style="dim")
    if warning := report.busy_warning(env):
        console.print(f"warning: {warning}", style="yellow")
    results = measure(setup, entries, arguments, console)
    content = {
        "benchmark": "train_step",
        "format": 1,
        "environment": env,
        "settings": dataclasses.asdict(setup) | {"rounds": arguments.rounds, "warmup": arguments.warmup},
        "models": [entry.describe() for entry in entries.values()],
        "results": results,
        "aims": [] if arguments.quick else judge(results),
    }
    print_results(console, content)
    default = report.RESULTS / f"train_step_{device}.json"
    path = arguments.output or (report.ROOT / "runs" / "train_step_quick.json" if arguments.quick else default)
    report.write_json(path, content)
    picture = path.with_suffix(".png")
    draw(picture, content)
    console.print(f"figures: {path}\npicture: {picture}", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    console = Console()
    arguments = _parse(argv)
    try:
        run(arguments, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
