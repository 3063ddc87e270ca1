"""The table of matched variants, printed before anything runs."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from motifarch.study.grid import Grid, Match, SizeSpec
from motifarch.study.matching import TOLERANCE, UNITS, Matched


def tables(grid: Grid, matched: Sequence[Matched]) -> Iterator[Table]:
    """A table for each size: heads, feed-forward width, and every cost with its difference from the
    reference.
    """
    for size in grid.sizes:
        yield _table(grid, size, [m for m in matched if m.size.name == size.name])


def _table(grid: Grid, size: SizeSpec, matched: Sequence[Matched]) -> Table:
    table = Table(
        title=f"{size.name}: equal {UNITS[grid.match]}, to {TOLERANCE:.0%} of {grid.reference_variant.name}; "
        f"hidden size {size.hidden_size}, {size.num_hidden_layers} layers, {grid.steps(size):,} steps of "
        f"{grid.recipe.batch.size} x {grid.data.seq_len} tokens, {len(grid.seeds)} seeds",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        collapse_padding=True,
    )
    table.add_column("variant", no_wrap=True)
    columns = (
        "heads\n(noise)",
        "key/value\nheads",
        "feed-\nforward",
        "parameters",
        "training\nMFLOP/token",
        "cache\nbytes/token",
    )
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for m in matched:
        noise = m.model["num_noise_heads"]
        table.add_row(
            m.name,
            f"{m.model['num_attention_heads']}{f' ({noise})' if noise else ''}",
            str(m.model["num_key_value_heads"]),
            str(m.model["intermediate_size"]),
            _cell(f"{m.costs.parameters:,}", m, "parameters"),
            _cell(f"{m.costs.flops / 1e6:,.2f}", m, "flops"),
            _cell(f"{m.costs.kv_cache:,}", m, "kv_cache"),
        )
    return table


def _cell(text: str, matched: Matched, by: Match) -> str:
    return f"{text} {matched.deviations[by]:+7.2%}"
