"""A plan: what a recipe needs on a number of GPUs, and how long it takes there."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motifarch.data import DataShape
from motifarch.data.manifest import FILE_NAME, Manifest
from motifarch.errors import UserError
from motifarch.hardware import Gpu
from motifarch.models.motif import MotifConfig
from motifarch.plan import memory
from motifarch.plan.assumptions import Assumptions
from motifarch.plan.dry_run import StepTrace, trace_step
from motifarch.plan.flops import DIRECTIONS, EXPERTS
from motifarch.plan.repeats import extrapolate, find_repeat
from motifarch.plan.timing import StepTime, step_time
from motifarch.train.inputs import batch_schedule, model_config
from motifarch.train.recipe import Recipe
from motifarch.train.recipe_rules import check_recipe


@dataclass
class Plan:
    """What was found; sizes in bytes for each GPU, times in seconds."""

    gpu: Gpu
    gpus: int
    recipe: Recipe
    seq_len: int
    trace: StepTrace
    assumptions: Assumptions
    time: StepTime
    tokens: float
    """Of the whole run."""
    suggestions: list["Suggestion"] = field(default_factory=list)
    faster: "Suggestion | None" = None
    """Where much memory is free: a change that takes more of it and less time."""

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that a step may take."""
        return self.gpu.memory * (1 - self.assumptions.reserve)

    @property
    def peak(self) -> int:
        """Bytes that a step takes at its peak."""
        return sum(self.trace.peak.values())

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.peak <= self.usable

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all GPUs."""
        return self.recipe.batch.size * self.seq_len

    @property
    def memory(self) -> dict[str, int]:
        """Peak bytes of each kind; different kinds may peak at different times."""
        r = self.trace
        exact = {
            memory.PARAMETERS: r.parameters,
            memory.OPTIMIZER: r.optimizer,
            memory.GRADIENTS: r.gradients,
        }
        return {kind: exact.get(kind, r.highest[kind]) for kind in memory.KINDS}

    def by_kind(self, sizes: dict[str, int]) -> dict[str, int]:
        """Bytes by kind with routed experts' apart."""
        r = self.trace
        whole = {memory.PARAMETERS: r.parameters, memory.OPTIMIZER: r.optimizer, memory.GRADIENTS: r.gradients}
        return memory.experts_apart(sizes, r.experts, whole)

    @property
    def flops_per_token(self) -> dict[str, float]:
        """FLOPs of one token by direction, and attention's part in each as "... attention"."""
        found = dict.fromkeys([*DIRECTIONS, *(f"{d} attention" for d in DIRECTIONS)], 0.0)
        scale = self.gpus / self.step_tokens
        for (phase, part), count in self.trace.flops.items():
            if part == EXPERTS:
                count /= self.trace.expert_load  # the busiest rank's
            direction = "forward" if phase == "loss" else phase
            if direction in DIRECTIONS:
                found[direction] += count * scale
                if part == "attention":
                    found[f"{direction} attention"] += count * scale
        return found

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.step_tokens / self.time.total

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: FLOPs without what is recomputed, over the peak."""
        flops = self.flops_per_token
        return (flops["forward"] + flops["backward"]) * self.tokens_per_second / (self.gpus * self.gpu.bf16_flops)

    @property
    def days(self) -> float:
        """Of the whole run, without checkpoints, validation and failures."""
        return self.tokens / self.tokens_per_second / 86400


@dataclass
class Suggestion:
    """A change that makes a recipe fit, or that was tried and does not."""

    changes: dict[str, Any]
    """Recipe fields and their new values."""
    peak: int
    """Bytes at the peak of a step."""
    fits: bool
    tokens_per_second: float


def find_shape(recipe: Recipe, seq_len: int | None) -> DataShape:
    """The sequences' length and vocabulary: the recipe's first dataset's, if it is prepared here.

    `seq_len`, in tokens, takes the place of the data's.

    Raises:
        UserError: neither says how long sequences are, or how large the vocabulary is.
    """
    folder = Path(recipe.data.datasets[0].path) if recipe.data.datasets else None
    manifest = Manifest.read(folder) if folder is not None and (folder / FILE_NAME).is_file() else None
    missing = f"{folder} is not prepared here" if folder is not None else "data.datasets is empty"
    if seq_len is None and manifest is None:
        raise UserError(f"how long are sequences? {missing}; give --seq-len, in tokens")
    if seq_len is not None and seq_len < 1:
        raise UserError(f"--seq-len is {seq_len}; it must be at least 1 token")
    vocab_size = manifest.vocab_size if manifest is not None else recipe.model.vocab_size
    if vocab_size is None:
        raise UserError(f"how large is the vocabulary? {missing} and model.vocab_size is null; give --model.vocab_size")
    length = seq_len if seq_len is not None else manifest.seq_len  # type: ignore[union-attr]
    return DataShape(length, vocab_size, manifest.eos_token_id if manifest is not None else 0, str(folder))


def planned_config(recipe: Recipe, data: DataShape) -> MotifConfig:
    """The recipe's model, with the attention that a GPU runs, where a dry run can.

    Raises:
        UserError: the model section fits neither itself nor the data.
    """
    asked = recipe.model.attn_implementation
    name = "triton" if asked is None or asked == "auto" else asked
    if name.startswith("flash"):
        name = "sdpa"  # flash-attn need not be installed here; torch's attention keeps and computes the same
    model = dataclasses.replace(recipe.model, attn_implementation=name)
    return model_config(dataclasses.replace(recipe, model=model), data)


def layer_kinds(recipe: Recipe, config: MotifConfig) -> list[tuple[Any, ...]]:
    """What each decoder layer of a model is: equal ones compute, keep and send the same."""
    recompute = recipe.activation_checkpointing
    every = recompute if isinstance(recompute, int) else 1
    return [(window, config.has_experts(i), i % every == 0) for i, window in enumerate(config.windows)]


def make_plan(
    recipe: Recipe,
    gpu: Gpu,
    gpus: int,
    *,
    seq_len: int | None = None,
    tokens: float | None = None,
    assumptions: Assumptions | None = None,
    rank: int = 0,
) -> Plan:
    """Plans a recipe for so many GPUs of a kind.

    Sequences have `seq_len` tokens, by default the recipe's data's; the whole run `tokens`, by
    default the recipe's steps'. Memory and work are those of one rank; the first has the largest
    shards.

    Raises:
        UserError: the recipe can't run on so many GPUs, or what is missing to plan it.
    """
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}; it must be at least 1")
    assumptions = assumptions or Assumptions()
    data = find_shape(recipe, seq_len)
    check_recipe(recipe, gpus)

    def trace_layers(count: int) -> StepTrace:
        part = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=count))
        return trace_step(
            part,
            planned_config(part, data),
            seq_len=data.seq_len,
            gpus=gpus,
            domain=gpu.domain,
            compute="bfloat16" if recipe.precision.compute == "auto" else recipe.precision.compute,
            rank=rank,
            expert_load=assumptions.expert_load,
        )

    repeat = find_repeat(layer_kinds(recipe, planned_config(recipe, data)))
    # A share of the layers is another one of a shorter stack.
    if repeat is None or 0 < recipe.parallel.reshard_after_forward < 1:
        trace = trace_layers(recipe.model.num_hidden_layers)
    else:
        trace = extrapolate(trace_layers(repeat.layers), trace_layers(repeat.layers + repeat.period), repeat)
    samples = batch_schedule(recipe.batch).samples_before(recipe.run.steps)
    return Plan(
        gpu=gpu,
        gpus=gpus,
        recipe=recipe,
        seq_len=data.seq_len,
        trace=trace,
        assumptions=assumptions,
        time=step_time(trace, gpu, assumptions, compiled=recipe.compile),
        tokens=tokens if tokens is not None else float(samples * data.seq_len),
    )
