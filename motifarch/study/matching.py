"""Makes variants equal: the feed-forward width takes up what their heads differ in, and the model's
own counts decide.

Parameters are those of the model itself, built without memory; training FLOPs are the model's
`flops_per_token` (matrix products and attention, forward and backward, at the study's sequence
length); the key/value cache is what its key and value projections put out for a token, in bfloat16.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from motifarch.counted import counted
from motifarch.data import DataShape
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.study.grid import Grid, Match, SizeSpec, VariantSpec
from motifarch.study.intermediate_size import match_intermediate_size
from motifarch.train.inputs import model_config
from motifarch.train.recipe import Recipe

TOLERANCE = 0.01
"""The largest difference from the reference in what is matched."""

UNITS: dict[Match, str] = {
    "parameters": "parameters",
    "flops": "training FLOPs per token",
    "kv_cache": "bytes of key/value cache per token",
}

Costs = dict[Match, float]
"""Parameters, FLOPs of training on a token, and bytes that a token keeps in generation."""


@dataclass(frozen=True)
class Matched:
    """A variant at a size, made equal to the reference."""

    variant: VariantSpec
    size: SizeSpec
    model: dict[str, Any]
    """Fields of the recipe's model section, and the vocabulary."""
    costs: Costs
    embedding_parameters: int
    """Of the parameters, those of the embedding and of an output projection that is not tied."""
    deviations: Costs
    """Relative difference from the reference in each cost."""

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name


def model_fields(
    variant: VariantSpec, size: SizeSpec, match: Match, intermediate_size: int, layers: int | None = None
) -> dict[str, Any]:
    """Fields of a recipe's model section, with the size's layers unless they are given.

    Head width and key/value heads stay, noise heads are the size's unless the variant has its own,
    and signal heads are ratio x noise heads. Softmax attention and DIFF V2, which have
    no noise heads to keep, take the size's query heads: DIFF V2 twice as many over the same
    key/value heads, as its authors ask. Where the cache is matched, softmax_mha has no more heads
    than the others have key/value heads.
    """
    noise = variant.noise_heads or size.num_noise_heads
    kv = size.num_key_value_heads or 2 * size.num_noise_heads
    query = size.num_query_heads or size.hidden_size // size.head_dim
    mha = kv if match == "kv_cache" else query
    differential = (((variant.ratio or 1) + 1) * noise, noise, kv)
    heads: dict[str, tuple[int, int | None, int]] = {  # query heads, noise heads among them, key/value heads
        "softmax_mha": (mha, None, mha),
        "softmax_gqa": (query, None, kv),
        "diff_v1": (2 * noise, noise, kv),
        "gda": differential,
        "diff_v2": (2 * query, query, kv),
    }
    own = heads["softmax_gqa"] if variant.ratio is None else differential
    queries, noise_heads, key_values = heads.get(variant.attention, own)
    return {
        "attention_type": "softmax" if variant.is_softmax else variant.attention,
        "hidden_act": variant.activation,
        "hidden_size": size.hidden_size,
        "num_hidden_layers": layers or size.num_hidden_layers,
        "head_dim": size.head_dim,
        "num_attention_heads": queries,
        "num_noise_heads": noise_heads,
        "num_key_value_heads": key_values,
        "intermediate_size": intermediate_size,
    }


def match(grid: Grid, sequences: DataShape) -> list[Matched]:
    """Makes all variants of all sizes equal, each size's to its reference.

    Args:
        grid: the study.
        sequences: length and vocabulary of its data.

    Returns:
        Sizes in the grid's order, and in each the variants in the grid's order.

    Raises:
        UserError: variants that stay more than 1% away, with what was reached, the nearest widths
            and what would help; or heads that no layer computes. Of those that no width makes up
            for, what is left is in their deviations.
    """
    found: list[Matched] = []
    refused: list[str] = []
    for size in grid.sizes:
        reference = partial(_costs, grid, sequences, size, grid.reference_variant)
        target = reference(size.intermediate_size)
        for variant in grid.compared_at(size):
            costs = partial(_costs, grid, sequences, size, variant)
            width, layers = size.intermediate_size, size.num_hidden_layers
            if variant.name != grid.reference_variant.name and variant.makes_up == "feed_forward":
                width = _nearest(costs, target, grid.match, size.intermediate_multiple)
            elif variant.name != grid.reference_variant.name and variant.makes_up == "depth":
                layers = _nearest(partial(costs, width), target, grid.match, 1)
            model = _model(grid, sequences, size, variant, width, layers)
            own = _costs_of(model, sequences)
            fields = model_fields(variant, size, grid.match, width, layers)
            deviations: Costs = {by: own[by] / target[by] - 1 for by in own}
            matched = Matched(variant, size, fields, own, _embedding_parameters(model), deviations)
            found.append(matched)
            if variant.makes_up == "feed_forward" and abs(matched.deviations[grid.match]) > TOLERANCE:
                refused.append(_refusal(grid.match, matched, costs, reference))
    _check_rates(grid, found)
    if refused:
        raise UserError(
            f"{len(refused)} of {len(found)} variants can't be matched to {grid.reference_variant.name!r} within "
            f"{TOLERANCE:.0%}:\n" + "\n".join(refused)
        )
    return found


def _check_rates(grid: Grid, found: Sequence[Matched]) -> None:
    """Refuses variants that take rates of the smallest size and are not made there."""
    if not grid.learning_rate.sweep or grid.learning_rate.transfer == "sweep":
        return
    smallest = min(found, key=lambda m: m.costs["parameters"]).size
    there = {m.name for m in found if m.size == smallest}
    for m in found:
        if m.name not in there:
            raise UserError(
                f"{m.name!r} is not made at size {smallest.name!r}, where learning rates are swept; let it be made "
                "there, or let learning_rate.transfer be sweep"
            )


def _costs(
    grid: Grid, sequences: DataShape, size: SizeSpec, variant: VariantSpec, width: int, layers: int | None = None
) -> Costs:
    """Those of a variant with a feed-forward width."""
    return _costs_of(_model(grid, sequences, size, variant, width, layers), sequences)


def _costs_of(model: MotifForCausalLM, sequences: DataShape) -> Costs:
    decoder: Any = model.model
    cached = sum(layer.self_attn.cache_width for layer in decoder.layers)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": model.flops_per_token(sequences.seq_len),
        "kv_cache": torch.bfloat16.itemsize * cached,
    }


def _model(
    grid: Grid, sequences: DataShape, size: SizeSpec, variant: VariantSpec, width: int, layers: int | None
) -> MotifForCausalLM:
    """Built without memory."""
    fields = model_fields(variant, size, grid.match, width, layers)
    recipe = Recipe(model=dataclasses.replace(grid.recipe.model, **fields))
    try:
        with torch.device("meta"):
            return MotifForCausalLM(model_config(recipe, sequences))
    except UserError as error:
        raise UserError(f"{variant.name} at size {size.name}: {error}") from None


def _embedding_parameters(model: MotifForCausalLM) -> int:
    """Those of the embedding, and of an output projection that is not tied to it."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum(p.numel() for p in {id(p): p for end in ends for p in end.parameters()}.values())


def _nearest(costs: Callable[[int], Costs], target: Costs, by: Match, multiple: int) -> int:
    """The allowed width or number of layers whose cost is nearest the target's; the cache does not
    depend on a width.
    """
    kind: Match = "parameters" if by == "kv_cache" else by
    return match_intermediate_size(lambda width: costs(width)[kind], target[kind], multiple=multiple)


def _refusal(by: Match, matched: Matched, costs: Callable[[int], Costs], reference: Callable[[int], Costs]) -> str:
    """Why a variant can't be matched, and what would help."""
    size, width, unit = matched.size, matched.model["intermediate_size"], matched.size.intermediate_multiple
    target = reference(size.intermediate_size)[by]
    aim = f"{target:,.0f} {UNITS[by]}"
    if by == "kv_cache":
        return (
            f"  {matched.name} at size {size.name}: {matched.costs[by]:,.0f} instead of {aim} "
            f"({matched.deviations[by]:+.1%}); its key/value heads decide, choose a num_key_value_heads that fits both"
        )
    nearest = [w for w in (width - unit, width, width + unit) if w > 0]
    reached = ", ".join(f"{costs(w)[by] / target - 1:+.2%} with a feed-forward of {w}" for w in nearest)
    if width == unit and matched.deviations[by] > 0:
        # What the reference would have to cost for the variant to reach it with a feed-forward as
        # wide as its heads.
        wanted = costs(max(unit, size.hidden_size))[by]
        slope = reference(size.intermediate_size + 1)[by] - target
        enough = size.intermediate_size + int((wanted - target) / slope) + 1
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
    wide = Console(width=max(console.width, 128), highlight=False)
    heads = ("heads\n(noise)", "key/value\nheads", "layers\n", "intermediate\nsize")
    costs = ("parameters", "training\nMFLOPs/token", "cache\nbytes/token")
    for size in grid.sizes:
        table = Table(
            title=f"{size.name}: equal {UNITS[grid.match]}, to {TOLERANCE:.0%} of {grid.reference_variant.name}; "
            f"hidden size {size.hidden_size}, {counted(size.num_hidden_layers, 'layer')}, "
            f"{counted(grid.steps(size), 'step')} of {grid.recipe.batch.size} x {grid.data.seq_len} tokens, "
            f"{counted(len(grid.seeds), 'seed')}",
            title_justify="left",
            box=box.SIMPLE,
            collapse_padding=True,
        )
        table.add_column("variant", no_wrap=True)
        for heading in (*heads, *costs):
            table.add_column(heading, justify="right", no_wrap=True)
        for m in (m for m in matched if m.size.name == size.name):
            noise = f" ({m.model['num_noise_heads']})" if m.model["num_noise_heads"] else ""
            counts = (f"{m.costs['parameters']:,}", f"{m.costs['flops'] / 1e6:,.2f}", f"{m.costs['kv_cache']:,}")
            table.add_row(
                m.name,
                f"{m.model['num_attention_heads']}{noise}",
                *(str(m.model[f"num_{name}"]) for name in ("key_value_heads", "hidden_layers")),
                str(m.model["intermediate_size"]),
                *(f"{count} {share:+7.2%}" for count, share in zip(counts, m.deviations.values(), strict=True)),
            )
        wide.print(table)
