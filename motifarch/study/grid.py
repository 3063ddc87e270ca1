"""A head-ratio study's grid: variants x sizes x seeds, from YAML, and its rules."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import Field

from motifarch import packaged_recipes
from motifarch.counted import counted
from motifarch.errors import UserError
from motifarch.field_types import (
    FilePath,
    Heads,
    ImportPath,
    Layers,
    Length,
    Ranks,
    Seed,
    Tokens,
    Vocabulary,
    Width,
    is_import_path,
)
from motifarch.study.measure_options import MeasureOptions
from motifarch.train.recipe import DatasetEntry, Recipe
from motifarch.train.recipe_rules import check_recipe
from motifarch.typed_yaml import Section, TypedYaml

Activation = Literal["poly_norm", "silu"]
Attention = Literal["softmax_mha", "softmax_gqa", "diff_v1", "gda", "diff_v2"]
Match = Literal["parameters", "flops", "kv_cache", "operations"]
"""What can be made equal; `operations` is the former name of `flops`."""
MakesUp = Literal["feed_forward", "depth", "nothing"]
"""What makes up for the cost of heads: the width of feed-forward blocks, the number of layers, or
nothing.
"""

DECIDED = (
    *("base", "data.datasets", "batch.warmup_start", "optim.lr"),
    *(f"run.{name}" for name in ("output", "steps", "seed", "resume", "init_from")),
    *(f"model.{name}" for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
    *(f"model.{name}" for name in ("num_noise_heads", "num_key_value_heads", "head_dim", "attention_type")),
    *(f"model.{name}" for name in ("paired_kv", "hidden_act")),
)
"""Fields of a run's recipe that the study sets for each run."""


@dataclass
class VariantSpec(Section):
    """An attention and an activation."""

    attention: Attention | ImportPath
    """`softmax_mha` (as many key/value heads as query heads), `softmax_gqa`, `diff_v1` (1:1),
    `gda`, `diff_v2`, or the import path of one of your own.
    """

    ratio: Heads | None = None
    """`gda`: signal heads for each noise head. Your own has the heads of `softmax_gqa`, or with a
    ratio those of `gda`.
    """

    noise_heads: Heads | None = None
    """With a ratio: noise heads; null means the size's."""

    makes_up: MakesUp = "feed_forward"
    """What makes up for what its heads cost more or less than the reference's."""

    activation: Activation = "poly_norm"
    """PolyNorm, or SiLU (SwiGLU)."""

    sizes: list[str] = field(default_factory=list)
    """Names of the sizes that it is made in; empty means all."""

    seeds: list[Seed] = field(default_factory=list)
    """Those of the study's seeds that it is trained with; empty means all."""

    @property
    def name(self) -> str:
        """What tables call it, such as "gda 4:1 poly_norm" or, of 8 signal and 2 noise heads,
        "gda 4:1 (8+2) poly_norm".
        """
        parts = [re.sub(r"^softmax_", "softmax ", re.split("[.:]", self.attention)[-1])]
        if self.ratio is not None:
            parts.append(f"{self.ratio}:1")
        if self.noise_heads is not None:
            parts.append(f"({(self.ratio or 1) * self.noise_heads}+{self.noise_heads})")
        if self.makes_up != "feed_forward":
            parts.append(self.makes_up)
        return " ".join([*parts, self.activation])

    @property
    def is_softmax(self) -> bool:
        """Whether it is the softmax attention that others are measured against."""
        return self.attention in ("softmax_mha", "softmax_gqa")

    @property
    def is_own(self) -> bool:
        """Whether it is of the user's own."""
        return is_import_path(self.attention)

    @property
    def head_ratio(self) -> int | None:
        """Signal heads for each noise head; None without noise heads."""
        if self.attention == "gda" or self.is_own:
            return self.ratio
        return None if self.is_softmax else 1

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return re.sub("[()]", "", self.name).replace(" ", "_").replace(":", "to")


@dataclass
class DesignSpec(Section):
    """One attention at several ratios, with one number of heads held.

    A ratio does not vary alone. With noise heads fixed, a higher one has more signal heads, and
    more heads in all; with signal heads fixed, fewer noise heads, and fewer in all; with query
    heads fixed, as many in all, divided otherwise. What is the ratio's, all three show.
    """

    fixed: Literal["noise_heads", "signal_heads", "query_heads"]
    """What is the same at every ratio: query heads are signal and noise heads together."""

    heads: Heads
    """How many of them."""

    ratios: list[Heads]
    """Signal heads for each noise head."""

    attention: Literal["gda"] | ImportPath = "gda"
    """`gda`, or the import path of one of your own that has noise heads."""

    makes_up: MakesUp = "feed_forward"
    """What makes up for what heads cost: `depth` comes no nearer than a layer."""

    activation: Activation = "poly_norm"
    """PolyNorm, or SiLU (SwiGLU)."""

    sizes: list[str] = field(default_factory=list)
    """Names of the sizes that it is made in; empty means all."""

    @property
    def name(self) -> str:
        """What reports call it, such as "12 query heads"."""
        own = "" if self.attention == "gda" else f", {re.split('[.:]', self.attention)[-1]}"
        made_up = "" if self.makes_up == "feed_forward" else f", {self.makes_up} making up"
        held = self.fixed.replace("_", " ")
        return f"{self.heads} {held if self.heads > 1 else held.removesuffix('s')}{own}{made_up}"

    def noise_heads(self, ratio: int) -> Fraction:
        """At a ratio; a fraction where the heads do not divide so."""
        share = {"noise_heads": 1, "signal_heads": ratio, "query_heads": ratio + 1}
        return Fraction(self.heads, share[self.fixed])

    @property
    def variants(self) -> list[VariantSpec]:
        """One for each ratio."""
        return [
            VariantSpec(
                self.attention,
                ratio,
                noise_heads=int(self.noise_heads(ratio)),
                makes_up=self.makes_up,
                activation=self.activation,
            )
            for ratio in self.ratios
        ]


@dataclass
class SizeSpec(Section):
    """What one size's variants share; signal heads follow from the ratio."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the size in tables and folders, such as 2m: letters, digits, dots and dashes."""

    hidden_size: Width
    """Width of the residual stream."""

    num_hidden_layers: Layers
    """Decoder layers."""

    head_dim: Heads
    """Width of a query/key head."""

    num_noise_heads: Heads
    """Noise heads of DIFF V1 and GDA."""

    intermediate_size: Width
    """The reference variant's intermediate size; the others' follow from matching."""

    intermediate_multiple: Width = 8
    """Intermediate sizes are multiples of this: smaller matches better, larger is faster."""

    num_key_value_heads: Heads | None = None
    """Key/value heads of all variants but softmax_mha; null means two (a pair) for each noise head.
    """

    num_query_heads: Heads | None = None
    """Query heads of softmax attention, and half of DIFF V2's; null means hidden_size / head_dim.
    """

    tokens: Tokens | None = None
    """Training tokens of a run; null means the study's."""

    ranks: Ranks = 1
    """Processes (on GPUs: GPUs) that one run takes; several share it by torchrun."""


@dataclass
class StudyData(Section):
    """The text; prepared first where `path` is missing and `source` says from what."""

    path: FilePath
    """A folder written by `motifarch data prepare`."""

    source: list[FilePath] = field(default_factory=list)
    """What to prepare it from, as `motifarch data prepare --source` takes it; empty never prepares.
    """

    seq_len: Length = 512
    """Tokens of a sequence."""

    tokenizer: FilePath | None = None
    """A Hugging Face tokenizer; null trains one on the text."""

    vocab_size: Vocabulary = 4096
    """Tokens of a trained tokenizer."""

    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Part of the documents kept for validation."""

    max_documents: Tokens | None = None
    """Read only so many documents of each source."""


@dataclass
class LearningRate(Section):
    """One learning rate for all variants, or each one's optimum by a sweep."""

    given: Annotated[float, Field(gt=0, le=10)] | None = None
    """The peak learning rate of every variant at the smallest size."""

    sweep: list[Annotated[float, Field(gt=0, le=10)]] = field(default_factory=list)
    """Rates tried with the first seed: of four and more the vertex of a parabola is taken, of fewer
    the best.
    """

    tokens: Tokens | None = None
    """Training tokens of a run of the sweep; null means a quarter of the study's."""

    transfer: Literal["same", "inverse_width", "sweep"] = "same"
    """Larger sizes take the smallest's rate as it is, or by hidden_size, as muP does, or have a
    sweep of their own.
    """


@dataclass
class Grid(Section):
    """A study: every variant at every size with every seed."""

    data: StudyData
    """The text."""

    sizes: list[SizeSpec]
    """Models to make each variant in."""

    tokens: Tokens
    """Training tokens of a run."""

    learning_rate: LearningRate
    """Given, or swept for each variant."""

    variants: list[VariantSpec] = field(default_factory=list)
    """What is compared, one by one."""

    designs: list[DesignSpec] = field(default_factory=list)
    """What is compared, head ratios with something held; a variant of several is trained once."""

    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    """Each seeds first weights and data order, alike for all variants."""

    match: Match = "parameters"
    """What is made equal: `parameters`; `flops`, of training a token at the data's seq_len,
    attention included; or `kv_cache`, the bytes a token keeps in generation (parameters are then
    matched as nearly as they can be).
    """

    reference: str | None = None
    """Name of the variant that the others are matched to, such as "gda 4:1 poly_norm"; null means
    the first.
    """

    recipe: Recipe = field(default_factory=Recipe)
    """The rest of a run, as `motifarch train` takes it: batch, optim, validation, ..."""

    measure: MeasureOptions = field(default_factory=MeasureOptions)
    """How much is measured after training: probe, attention, decoding speed."""

    def __post_init__(self) -> None:
        if self.match == "operations":
            warnings.warn("match: operations is deprecated; write match: flops", FutureWarning, stacklevel=2)
            self.match = "flops"

    @property
    def reference_variant(self) -> VariantSpec:
        """The variant that the others are matched to."""
        return next((v for v in self.compared if v.name == self.reference), self.compared[0])

    @property
    def compared(self) -> list[VariantSpec]:
        """All variants, those of designs last, each once."""
        return self._named(lambda spec: True)

    def compared_at(self, size: SizeSpec) -> list[VariantSpec]:
        """Those of a size."""
        return self._named(lambda spec: not spec.sizes or size.name in spec.sizes)

    def _named(self, taken: Callable[[VariantSpec | DesignSpec], bool]) -> list[VariantSpec]:
        own, of_designs = filter(taken, self.variants), (d.variants for d in self.designs if taken(d))
        return list({v.name: v for v in chain(own, *of_designs)}.values())

    def steps(self, size: SizeSpec, tokens: int | None = None) -> int:
        """Optimizer steps of a run: the fewest that read at least its tokens."""
        tokens = tokens or size.tokens or self.tokens
        return -(-tokens // (self.recipe.batch.size * self.data.seq_len))


GRIDS = TypedYaml(Grid, "study", packaged=packaged_recipes.studies)


def read_grid(argv: Sequence[str]) -> Grid:
    """Reads and checks a grid.

    Args:
        argv: ``STUDY.yaml --section.field value ...``.

    Raises:
        UserError: a missing or unreadable file, an unknown field, a value that is not accepted.
    """
    grid = GRIDS.read(argv)
    check_grid(grid)
    return grid


def check_grid(grid: Grid) -> None:
    """Refuses impossible values and combinations.

    Raises:
        UserError: naming the field, its value and what is accepted.
    """
    for name in ("sizes", "seeds"):
        if not getattr(grid, name):
            raise UserError(f"{name} is empty; give at least one entry")
    if not grid.compared:
        raise UserError("variants and designs are empty; give at least one entry of either")
    _check_variants(grid)
    _check_designs(grid)
    _unique("sizes", [s.name for s in grid.sizes])
    _check_sizes(grid)
    _unique("seeds", grid.seeds)
    for i, variant in enumerate(grid.variants):
        _unique(f"variants[{i}].seeds", variant.seeds)
        if unknown := [seed for seed in variant.seeds if seed not in grid.seeds]:
            raise UserError(
                f"variants[{i}].seeds has {unknown[0]}, which is no seed of the study; accepted: "
                f"{', '.join(map(str, grid.seeds))}"
            )
    _check_learning_rate(grid.learning_rate)
    _check_recipe(grid)


def _check_sizes(grid: Grid) -> None:
    names = [size.name for size in grid.sizes]
    for kind in ("variants", "designs"):
        for i, spec in enumerate(getattr(grid, kind)):
            if unknown := [name for name in spec.sizes if name not in names]:
                raise UserError(f"{kind}[{i}].sizes has {unknown[0]!r}, which is no size; accepted: {', '.join(names)}")
    for size in grid.sizes:
        if grid.reference_variant.name not in [v.name for v in grid.compared_at(size)]:
            raise UserError(
                f"the reference {grid.reference_variant.name!r} is not made at size {size.name!r}, whose variants are "
                "matched to it; take sizes from it, or give another reference"
            )


def _check_variants(grid: Grid) -> None:
    for i, variant in enumerate(grid.variants):
        chooses = variant.attention == "gda" or variant.is_own
        if variant.attention == "gda" and (variant.ratio or 0) < 1:
            raise UserError(f"variants[{i}].ratio is {variant.ratio}; gda needs its signal heads for each noise head")
        if not chooses and variant.ratio is not None:
            raise UserError(
                f"variants[{i}].ratio is {variant.ratio}, but {variant.attention} has no choice of ratio; leave it "
                "out, or let attention be gda"
            )
        if variant.noise_heads is not None and (not chooses or variant.ratio is None):
            raise UserError(
                f"variants[{i}].noise_heads is {variant.noise_heads}, but {variant.attention} has no choice of them "
                "without a ratio; leave it out, or let attention be gda"
            )
    _unique("variants", [v.name for v in grid.variants])
    names = [v.name for v in grid.compared]
    if grid.reference is not None and grid.reference not in names:
        raise UserError(f"reference is {grid.reference!r}, which is no variant; accepted: {', '.join(names)}")


def _check_designs(grid: Grid) -> None:
    for i, design in enumerate(grid.designs):
        if len(design.ratios) < 2:
            raise UserError(f"designs[{i}].ratios is {design.ratios}; give at least two ratios to compare")
        _unique(f"designs[{i}].ratios", design.ratios)
        if not_whole := [r for r in design.ratios if design.noise_heads(r).denominator > 1]:
            fit = [r for r in range(1, design.heads + 1) if design.noise_heads(r).denominator == 1]
            raise UserError(
                f"designs[{i}].ratios has {not_whole[0]}, and {design.heads} {design.fixed.replace('_', ' ')} do not "
                f"divide {not_whole[0]}:1; accepted: {', '.join(map(str, fit))}, or other heads"
            )
    _unique("designs", [design.name for design in grid.designs])


def _check_learning_rate(rate: LearningRate) -> None:
    if (rate.given is None) == (not rate.sweep):
        raise UserError(
            f"learning_rate.given is {rate.given} and learning_rate.sweep is {rate.sweep}; give one of them: a rate, "
            "or a list of rates for each variant to choose from (null and '[]' take back what a file gives)"
        )
    _unique("learning_rate.sweep", rate.sweep)
    if len(rate.sweep) == 1:
        raise UserError(f"learning_rate.sweep is {rate.sweep}; give at least two rates, or the one as given")


def _check_recipe(grid: Grid) -> None:
    default = Recipe()
    for name in DECIDED:
        if (value := attrgetter(name)(grid.recipe)) != attrgetter(name)(default):
            raise UserError(
                f"recipe.{name} is {value!r}, but the study decides it for each run; leave it out (sizes, variants, "
                "seeds, tokens, data and learning_rate say what it becomes)"
            )
    if grid.recipe.validation.every < 1:
        raise UserError("recipe.validation.every is 0; a study compares validation losses, so give steps between them")
    if grid.data.seq_len > grid.recipe.model.max_position_embeddings:
        raise UserError(
            f"data.seq_len is {grid.data.seq_len}, more than recipe.model.max_position_embeddings "
            f"({grid.recipe.model.max_position_embeddings})"
        )
    for size in grid.sizes:
        # The fields that the study decides are filled in with something that passes.
        sample = dataclasses.replace(
            grid.recipe,
            run=dataclasses.replace(grid.recipe.run, steps=grid.steps(size)),
            data=dataclasses.replace(grid.recipe.data, datasets=[DatasetEntry(grid.data.path)]),
        )
        try:
            check_recipe(sample, size.ranks)
        except UserError as error:
            raise UserError(
                f"the study's recipe at size {size.name} ({counted(grid.steps(size), 'step')}): {error}"
            ) from None


def _unique(name: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{name} holds {value} twice; leave one out")
