"""Makes variants equal: the feed-forward width takes up what their heads differ in, and the model's
own counts decide.

Parameters are those of the model itself, built without memory; training FLOPs are the model's
`flops_per_token` (matrix products and attention, forward and backward, at the study's sequence
length); the key/value cache is what its key and value projections put out for a token, in bfloat16.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from motifarch.data import DataShape
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.study.grid import Grid, Match, SizeSpec, VariantSpec
from motifarch.study.intermediate_size import match_intermediate_size
from motifarch.study.variants import model_fields
from motifarch.train.inputs import model_config
from motifarch.train.recipe import Recipe

TOLERANCE = 0.01
"""The largest difference from the reference in what is matched."""

CACHE_BYTES = 2
"""Of a number in the key/value cache: bfloat16."""

UNITS: dict[str, str] = {
    "parameters": "parameters",
    "flops": "training FLOPs per token",
    "kv_cache": "bytes of key/value cache per token",
}


@dataclass(frozen=True)
class Costs:
    """What a model costs."""

    parameters: int
    flops: float
    """Floating-point operations of training on a token."""
    kv_cache: int
    """Bytes that a token keeps in generation."""


@dataclass(frozen=True)
class Matched:
    """A variant at a size, made equal to the reference."""

    variant: VariantSpec
    size: SizeSpec
    model: dict[str, Any]
    """Fields of the recipe's model section, and the vocabulary."""
    costs: Costs
    deviations: dict[Match, float]
    """Relative difference from the reference in each cost."""

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name


def count_costs(recipe: Recipe, sequences: DataShape) -> Costs:
    """The costs of a recipe's model, from the model itself, built without memory.

    Raises:
        UserError: no layer computes such a model.
    """
    config = model_config(recipe, sequences)
    with torch.device("meta"):
        model = MotifForCausalLM(config)
    kept = 0
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):  # type: ignore[union-attr]
            assert isinstance(projection, nn.Linear)
            kept += projection.out_features * CACHE_BYTES
    parameters = sum(p.numel() for p in model.parameters())
    return Costs(parameters, model.flops_per_token(sequences.seq_len), kept)


def match(grid: Grid, sequences: DataShape) -> list[Matched]:
    """Makes all variants of all sizes equal, each size's to its reference.

    Args:
        grid: the study.
        sequences: length and vocabulary of its data.

    Returns:
        Sizes in the grid's order, and in each the variants in the grid's order.

    Raises:
        UserError: variants that stay more than 1% away, with what was reached, the nearest widths
            and what would help.
    """
    found: list[Matched] = []
    refused: list[str] = []
    for size in grid.sizes:
        reference = _Widths(grid, size, grid.reference_variant, sequences)
        target = reference(size.intermediate_size)
        for variant in grid.variants:
            widths = _Widths(grid, size, variant, sequences)
            width = (
                size.intermediate_size if variant == grid.reference_variant else _nearest(widths, target, grid.match)
            )
            costs = widths(width)
            matched = Matched(variant, size, widths.fields(width), costs, _deviations(costs, target))
            found.append(matched)
            if abs(matched.deviations[grid.match]) > TOLERANCE:
                refused.append(_refusal(grid, matched, widths, reference, target))
    if refused:
        raise UserError(
            f"{len(refused)} of {len(found)} variants can't be matched to {grid.reference_variant.name!r} within "
            f"{TOLERANCE:.0%}:\n" + "\n".join(refused)
        )
    return found


class _Widths:
    """A variant's costs as its feed-forward width varies."""

    def __init__(self, grid: Grid, size: SizeSpec, variant: VariantSpec, sequences: DataShape) -> None:
        self.grid, self.size, self.variant, self.sequences = grid, size, variant, sequences

    def fields(self, width: int) -> dict[str, Any]:
        return model_fields(self.variant, self.size, self.grid.match, width)

    def __call__(self, width: int) -> Costs:
        recipe = Recipe(model=dataclasses.replace(self.grid.recipe.model, **self.fields(width)))
        try:
            return count_costs(recipe, self.sequences)
        except UserError as error:
            raise UserError(f"{self.variant.name} at size {self.size.name}: {error}") from None


def _cost(by: Match) -> Callable[[Costs], float]:
    return lambda costs: float(getattr(costs, by))


def _deviations(costs: Costs, target: Costs) -> dict[Match, float]:
    kinds: tuple[Match, ...] = ("parameters", "flops", "kv_cache")
    return {by: _cost(by)(costs) / _cost(by)(target) - 1 for by in kinds}


def _nearest(widths: _Widths, target: Costs, by: Match) -> int:
    """The allowed width whose cost is nearest the target's; the cache does not depend on it."""
    cost = _cost("parameters" if by == "kv_cache" else by)
    return match_intermediate_size(
        lambda width: cost(widths(width)), cost(target), multiple=widths.size.intermediate_multiple
    )


def _refusal(grid: Grid, matched: Matched, widths: _Widths, reference: _Widths, target: Costs) -> str:
    by, size = grid.match, matched.size
    cost, width = _cost(by), matched.model["intermediate_size"]
    aim = f"{cost(target):,.0f} {UNITS[by]}"
    if by == "kv_cache":
        return (
            f"  {matched.name} at size {size.name}: {cost(matched.costs):,.0f} instead of {aim} "
            f"({matched.deviations[by]:+.1%}); its key/value heads decide, choose a num_key_value_heads that fits both"
        )
    unit = size.intermediate_multiple
    nearest = [w for w in (width - unit, width, width + unit) if w > 0]
    reached = ", ".join(f"{_deviations(widths(w), target)[by]:+.2%} with a feed-forward of {w}" for w in nearest)
    if width == unit and matched.deviations[by] > 0:
        # What the reference would have to cost for the variant to reach it with a feed-forward as
        # wide as its heads.
        wanted = cost(widths(max(unit, size.hidden_size)))
        slope = cost(reference(size.intermediate_size + 1)) - cost(target)
        enough = size.intermediate_size + int((wanted - cost(target)) / slope) + 1
        help_ = (
            f"its attention alone takes too much: raise sizes.intermediate_size ({size.intermediate_size}) to about "
            f"{enough}, lower num_noise_heads ({size.num_noise_heads}), or leave the variant out"
        )
    else:
        help_ = f"lower sizes.intermediate_multiple ({unit}), or make the model wider or less deep"
    return f"  {matched.name} at size {size.name}: the reference has {aim}; reached: {reached}; {help_}"


def print_matched(grid: Grid, matched: Sequence[Matched], console: Console) -> None:
    """Prints a table for each size: heads, widths, costs and their differences."""
    # Narrower terminals fold its lines, which loses less than cutting its cells.
    wide = Console(width=max(console.width, 120), highlight=False)
    columns = ("heads\n(noise)", "key/value\nheads", "intermediate\nsize")
    costs = ("parameters", "training\nMFLOPs/token", "cache\nbytes/token")
    for size in grid.sizes:
        table = Table(
            title=f"{size.name}: equal {UNITS[grid.match]}, to {TOLERANCE:.0%} of {grid.reference_variant.name}; "
            f"hidden size {size.hidden_size}, {size.num_hidden_layers} layers, {grid.steps(size):,} steps of "
            f"{grid.recipe.batch.size} x {grid.data.seq_len} tokens, {len(grid.seeds)} seeds",
            title_justify="left",
            box=box.SIMPLE,
            collapse_padding=True,
        )
        table.add_column("variant", no_wrap=True)
        for heading in (*columns, *costs):
            table.add_column(heading, justify="right", no_wrap=True)
        for m in (m for m in matched if m.size.name == size.name):
            noise = f" ({m.model['num_noise_heads']})" if m.model["num_noise_heads"] else ""
            counts = (f"{m.costs.parameters:,}", f"{m.costs.flops / 1e6:,.2f}", f"{m.costs.kv_cache:,}")
            table.add_row(
                m.name,
                f"{m.model['num_attention_heads']}{noise}",
                *(str(m.model[name]) for name in ("num_key_value_heads", "intermediate_size")),
                *(f"{count} {share:+7.2%}" for count, share in zip(counts, m.deviations.values(), strict=True)),
            )
        wide.print(table)
