"""A plan as text for people and as JSON for programs."""

import dataclasses
import io
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from motifarch.counted import counted
from motifarch.layout import DIMENSIONS
from motifarch.plan.planning import Plan
from motifarch.plan.timing import PARTS, Assumptions
from motifarch.train.read_recipe import to_dict

_GIB, _GB = 2.0**30, 1e9


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan, with its units in the names; bytes are for each GPU."""
    r = plan.trace
    return {
        "gpu": dataclasses.asdict(plan.gpu),
        "gpus": plan.gpus,
        "layout": dataclasses.asdict(r.layout),
        "parameter_count": r.parameter_count,
        "seq_len": plan.seq_len,
        "tokens_per_step": plan.step_tokens,
        "rows_per_micro_batch": r.rows,
        "micro_batches": r.micro_batches,
        "fits": plan.fits,
        "memory": {
            "peak_bytes": plan.peak,
            "peak_phase": r.peak_phase,
            "offloaded_bytes": r.offloaded,
            "usable_bytes": plan.usable,
            "capacity_bytes": plan.gpu.memory,
            "at_peak_bytes": plan.by_kind(r.peak),
            "most_bytes": plan.by_kind(plan.memory),
            "activations_kept_for_backward_bytes": r.activations,
            "largest_gathered_layer_bytes": r.largest_layer,
            "gathered_outside_layers_bytes": r.outside_layers,
        },
        "traffic": [dataclasses.asdict(t) for t in r.traffic],
        "sent_bytes": _by_link(plan),
        "flops_per_token": plan.flops_per_token,
        "optimizer_flops_per_step_and_gpu": _optimizer_flops(plan),
        "time_seconds": dataclasses.asdict(plan.time) | {"step": plan.time.total},
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_and_gpu": plan.tokens_per_second / plan.gpus,
        "model_flops_utilisation": plan.utilisation,
        "tokens": plan.tokens,
        "days": plan.days,
        "gpu_hours": plan.days * 24 * plan.gpus,
        "assumptions": dataclasses.asdict(plan.assumptions),
        "advice": [dataclasses.asdict(s) for s in plan.suggestions],
        "faster": dataclasses.asdict(plan.faster) if plan.faster else None,
        "recipe": to_dict(plan.recipe),
    }


def _optimizer_flops(plan: Plan) -> float:
    return sum(n for (phase, _), n in plan.trace.flops.items() if phase == "optimizer")


def _by_link(plan: Plan) -> dict[str, float]:
    found = {"NVLink": 0.0, "network": 0.0}
    for traffic in plan.trace.traffic:
        found[traffic.link] += traffic.sent
    return found


def render(plan: Plan, name: str) -> Group:
    """What `motifarch plan` prints."""
    return Group(_head(plan, name), _memory(plan), _traffic(plan), _work(plan), _time(plan), *_tail(plan))


def plain(content: RenderableType) -> str:
    """What is printed, without colours."""
    written = io.StringIO()
    Console(width=110, file=written).print(content)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def table(title: str, *columns: str) -> Table:
    """An empty table, the first column to the left."""
    found = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        # Of a narrow terminal: names are folded, not cut short.
        found.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return found


def _head(plan: Plan, name: str) -> Text:
    r = plan.trace
    sizes = " x ".join(f"{name} {getattr(r.layout, name)}" for name in DIMENSIONS)
    experts = f", expert {r.layout.expert} of shard x context" if r.layout.expert > 1 else ""
    micro = counted(r.micro_batches, f"micro-batch of {r.rows}")
    sequences = counted(plan.recipe.batch.size, f"sequence of {plan.seq_len:,} tokens")
    return Text(
        f"{name} on {plan.gpus} x {plan.gpu.name}, {plan.gpu.domain} to an NVLink domain\n"
        f"{r.parameter_count:,} parameters; {sizes}{experts}\n"
        f"{sequences} a step ({plan.step_tokens:,} tokens), "
        f"{micro} on each rank; activation checkpointing {plan.recipe.activation_checkpointing}\n"
    )


def _memory(plan: Plan) -> Table:
    r = plan.trace
    found = table("Memory of a GPU (GiB)", "", "at the peak of a step", "its own peak")
    most = plan.by_kind(plan.memory)
    for kind, size in plan.by_kind(r.peak).items():
        found.add_row(kind, f"{size / _GIB:.2f}", f"{most[kind] / _GIB:.2f}")
    found.add_row("together", f"{plan.peak / _GIB:.2f}", "", style="bold")
    found.add_row(f"of {plan.gpu.memory / _GIB:.2f}, less a reserve", f"{plan.usable / _GIB:.2f}", "", end_section=True)
    found.caption = (
        f"The peak is in the {r.peak_phase} phase. {r.activations / _GIB:.2f} of activations are kept for the "
        f"backward pass of a micro-batch. A decoder layer is {r.largest_layer / _GIB:.2f} as it is gathered; "
        f"what is outside of the layers is {r.outside_layers / _GIB:.2f}."
    )
    if r.offloaded:
        found.caption = f"{found.caption} {r.offloaded / _GIB:.2f} of moments lie in the CPU's memory."
    found.caption_justify = "left"
    return found


def _traffic(plan: Plan) -> Table:
    found = table("\nSent by a GPU in a step (GB)", "", "collective", "ranks", "calls", "NVLink", "network")
    for t in plan.trace.traffic:
        cells = [f"{t.sent / _GB:.3f}" if t.link == link else "" for link in ("NVLink", "network")]
        found.add_row(t.name, t.kind, str(t.ranks), f"{t.calls:,.0f}", *cells)
    links = _by_link(plan)
    found.add_row("together", "", "", "", *(f"{links[k] / _GB:.3f}" for k in ("NVLink", "network")), style="bold")
    return found


def _work(plan: Plan) -> Table:
    flops = plan.flops_per_token
    found = table("\nFLOPs of a token (10^9)", "", "all", "of which attention")
    for direction in ("forward", "backward", "recompute"):
        label = "recomputed" if direction == "recompute" else direction
        found.add_row(label, f"{flops[direction] / 1e9:.2f}", f"{flops[direction + ' attention'] / 1e9:.2f}")
    if optimizer := _optimizer_flops(plan):
        found.caption = f"Newton-Schulz takes {optimizer / 1e12:.1f} x 10^12 a step on the busiest GPU."
        found.caption_justify = "left"
    return found


def _time(plan: Plan) -> Table:
    t = plan.time
    found = table("\nTime of a step (seconds, estimated)", "", "")
    for part, label in PARTS.items():
        found.add_row(label, f"{getattr(t, part):.3f}")
    found.add_row("together", f"{t.total:.3f}", style="bold")
    speed = plan.tokens_per_second
    found.add_row("tokens/s", f"{speed:,.0f}")
    found.add_row("tokens/s per GPU", f"{speed / plan.gpus:,.0f}")
    found.add_row("model FLOPs utilisation", f"{plan.utilisation:.1%}")
    found.add_row(f"days to {plan.tokens:.4g} tokens", f"{plan.days:,.2f}")
    found.add_row("GPU-hours", f"{plan.days * 24 * plan.gpus:,.0f}")
    return found


def _tail(plan: Plan) -> list[Text]:
    options = ", ".join(
        f"--{f.name.replace('_', '-')} {getattr(plan.assumptions, f.name):g}" for f in dataclasses.fields(Assumptions)
    )
    gpu = plan.gpu
    lines = [
        Text(
            f"\nAssumed, not measured: {options}; {gpu.bf16_flops / 1e12:,.0f} x 10^12 bf16 FLOPs/s, "
            f"{gpu.memory_bandwidth / 1e12:g} TB/s memory, {gpu.nvlink / _GB:g} GB/s NVLink and {gpu.network / _GB:g} "
            f"GB/s network a GPU each way ({gpu.source}); documents as long as their rows; no latencies.\n"
        )
    ]
    if plan.recipe.precision.compute == "float32":
        lines.append(Text("precision.compute is float32: memory holds, but the times are those of bf16 products.\n"))
    if (matmul := plan.recipe.precision.matmul) != "compute":
        lines.append(Text(f"precision.matmul is {matmul}, and the plan is for bf16 products: a longest time.\n"))
    if plan.fits:
        lines.append(Text(f"It fits: {(plan.usable - plan.peak) / _GIB:.1f} GiB are free.", style="bold green"))
        if plan.faster:
            change = " ".join(f"--{name} {value}" for name, value in plan.faster.changes.items())
            speed = plan.faster.tokens_per_second / plan.tokens_per_second
            text = f"  with {change}: {plan.faster.peak / _GIB:.1f} GiB, fits, {speed:.2f} times the tokens/s"
            lines.append(Text(text, style="bold green"))
        return lines
    lines.append(Text(f"It does not fit: {(plan.peak - plan.usable) / _GIB:.1f} GiB are missing.", style="bold red"))
    for suggestion in plan.suggestions:
        change = " ".join(f"--{name} {value}" for name, value in suggestion.changes.items())
        verdict = "fits" if suggestion.fits else "does not fit"
        speed = suggestion.tokens_per_second / plan.tokens_per_second
        text = f"  {change}: {suggestion.peak / _GIB:.1f} GiB, {verdict}, {speed:.2f} times the tokens/s"
        lines.append(Text(text, style="bold green" if suggestion.fits else ""))
    if not any(s.fits for s in plan.suggestions):
        tried = "Nothing tried fits; take" if plan.suggestions else "Take"
        lines.append(Text(f"{tried} more GPUs, GPUs with more memory, or a smaller model."))
    return lines
