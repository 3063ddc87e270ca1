"""The recipe of a run: one typed dataclass a section, and the rules that hold between fields.

A YAML file and the command line are read into `Recipe` by `motifarch.train.read_recipe`. Every
field can be overridden by its dotted name, for example ``--optim.lr 3e-4``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from motifarch.errors import UserError
from motifarch.parallel import Layout, check_activation_checkpointing
from motifarch.parallel.activation_checkpointing import Recompute
from motifarch.parallel.low_precision import Matmul


@dataclass
class RunSection:
    """What is run, how long, and where its files go."""

    output: str = "runs/default"
    """Folder for everything that the run writes."""

    steps: int = 1000
    """Optimizer steps of the whole run, those before a resume included."""

    seed: int = 0
    """Seeds the model's first weights and the order of the data."""

    resume: str = "auto"
    """`auto`: the newest complete checkpoint in the output folder, or from scratch; `none`; or a
    checkpoint folder.
    """

    init_from: str | None = None
    """First weights: a checkpoint folder or a Hugging Face folder. The optimizer and the data start
    afresh.
    """

    max_nonfinite_in_row: int = 10
    """Stop when this many steps one after another had a non-finite loss or gradient
    (each is skipped).
    """

    max_nonfinite_total: int = 100
    """Stop when this many steps of the whole run had a non-finite loss or gradient."""

    spike_sigma: float | None = None
    """Skip a step whose loss or gradient norm is more than this many standard deviations above the
    mean of the last accepted steps; null skips none. A low value (3) skips honest steps too, a high
    one (10) only the worst; OLMo-core takes 6.
    """

    spike_window: int = 128
    """Accepted steps that a step is compared with; none is skipped before there are so many. A long
    window steadies the statistics but falls behind a loss that changes fast.
    """

    spike_max_in_row: int = 10
    """After this many spikes one after another the next step is accepted and the window starts
    again: the level has changed for good. Higher sits out longer stretches of bad data, and loses
    as many steps to a change that is real.
    """


@dataclass
class ModelSection:
    """The model: fields of MotifConfig."""

    vocab_size: int | None = None
    """Rows of the embedding; null takes the tokenizer's size, rounded up to `vocab_multiple`."""

    vocab_multiple: int = 64
    """What a vocabulary size taken from the tokenizer is rounded up to."""

    hidden_size: int = 256
    """Width of the residual stream."""

    intermediate_size: int = 1024
    """Intermediate size of the feed-forward block."""

    num_hidden_layers: int = 6
    """Decoder layers."""

    num_attention_heads: int = 10
    """Query heads, signal and noise together."""

    num_noise_heads: int | None = None
    """Noise heads among them; null means half of the heads."""

    num_key_value_heads: int | None = None
    """Key/value heads; null means as many as query heads."""

    head_dim: int | None = None
    """Width of a query/key head; null means hidden_size / num_attention_heads."""

    attention_type: Literal["gda", "diff_v1", "diff_v2", "softmax"] = "gda"
    """Grouped differential attention, DIFF V1, DIFF V2, or plain softmax attention."""

    paired_kv: bool | None = None
    """`gda`, `diff_v1`: keys in pairs for signal and noise, with values of twice head_dim; null
    means yes, false leaves ordinary key/value heads.
    """

    attention_gate: bool = False
    """`diff_v2`: an elementwise sigmoid gate on the difference."""

    sub_norm: bool | None = None
    """RMS-normalise each head's output; null means yes for `gda` and `diff_v1`, no for `diff_v2`.
    """

    qk_norm: bool = False
    """RMS-normalise query and key heads."""

    lambda_init_depth_offset: int | None = None
    """Added to the layer's index in lambda_init; null means -1 for `gda`, 0 for `diff_v1`."""

    lambda_init: float | None = None
    """The constant of every layer's lambda with `gda` and `diff_v1`; null takes the one by depth.
    """

    hidden_act: Literal["poly_norm", "silu"] = "poly_norm"
    """Activation of the feed-forward block: PolyNorm, or SiLU (SwiGLU)."""

    poly_norm_eps: float = 1e-6
    """PolyNorm's epsilon."""

    max_position_embeddings: int = 4096
    """Longest sequence the model is meant for, in tokens."""

    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""

    rope_scaling: dict[str, Any] | None = None
    """Scaling of its frequencies, as in a model's config.json: a `rope_type` (linear, yarn, llama3)
    and its numbers.
    """

    rms_norm_eps: float = 1e-6
    """Epsilon of the layers' RMS norms."""

    attn_rms_norm_eps: float = 1e-5
    """Epsilon of the norm after the difference of the two attention maps."""

    tie_word_embeddings: bool = True
    """Whether the output projection is the embedding's matrix."""

    use_bias: bool = False
    """Whether linear layers have biases, as in models made of Qwen2's."""

    sliding_window: int | None = None
    """Tokens that a token sees, itself included; used with `use_sliding_window`."""

    use_sliding_window: bool = False
    """Whether attention is limited to the sliding window."""

    initializer_range: float = 0.02
    """Standard deviation of the first weights."""

    attn_implementation: Literal["auto", "triton", "flash_attention_2", "sdpa", "eager"] | None = None
    """Which attention carries the model: "triton" is one fused kernel, "flash_attention_2"
    whichever flash-attn is installed, "sdpa" torch's, "eager" the plain formula; null or "auto"
    takes the fastest that serves it.
    """


@dataclass
class DatasetEntry:
    """One prepared dataset of the mixture."""

    path: str
    """A folder written by `motifarch data prepare`."""

    weight: float = 1.0
    """Share of the samples, relative to the other datasets' weights."""

    weight_end: float | None = None
    """The share once the ramp has ended; null keeps `weight`."""


@dataclass
class DataSection:
    """What is read."""

    datasets: list[DatasetEntry] = field(default_factory=list)
    """The mixture, one entry a prepared dataset."""

    ramp_start: int = 0
    """Step at which the weights begin to move towards `weight_end`."""

    ramp_end: int = 0
    """Step at which they arrive."""


@dataclass
class BatchSection:
    """How many sequences make a step."""

    size: int = 32
    """Sequences in a global batch, over all ranks."""

    micro_size: int = 8
    """Sequences that one rank runs through the model at once; the rest is accumulated."""

    warmup_start: int | None = None
    """Global batch at step 0, growing linearly to `size`; null starts at `size`."""

    warmup_steps: int = 0
    """Steps that the growth takes."""

    warmup_multiple: int | None = None
    """Batch sizes on the way are multiples of this; null takes ranks x micro_size."""


@dataclass
class OptimSection:
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the matrices inside the decoder layers, with AdamW for all else."""

    lr: float = 5e-4
    """Peak learning rate."""

    muon_lr_ratio: float = 1.0
    """`muon`: multiplies `lr` for Muon's matrices, whose updates have the size of AdamW's at 1."""

    momentum: float = 0.95
    """`muon`: decay rate of the mean gradient (Nesterov's)."""

    ns_coefficients: Literal["polar_express", "keller_jordan"] = "polar_express"
    """`muon`: the five Newton-Schulz steps' polynomials: one each, or one for all."""

    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """`muon`: what Newton-Schulz computes in and ranks send. float32, at twice the bytes, is for
    comparing runs.
    """

    muon_chunk_mib: int = 128
    """`muon`: MiB of whole matrices that a rank gathers at once. Less saves memory, more makes
    larger messages.
    """

    qk_clip: float | None = None
    """After each step, scale query and key heads whose largest logit was above this back to it
    (MuonClip; 100 is Kimi K2's); null leaves them.
    """

    offload: bool = False
    """Keep the moments in CPU memory, on the GPU only while they are updated: frees 8 bytes a
    parameter of AdamW's (4 of Muon's) on the rank that holds it, and moves as much over the bus
    each way in every step. Results stay the same in every bit.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors and scalars (norms, lambdas, PolyNorm) have none.
    """

    decay_embeddings: bool = True
    """Whether the embedding matrix is decayed too."""

    clip: float | None = 1.0
    """Largest global gradient norm; null never clips."""

    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2), which keeps logits from drifting."""

    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Warm-up, stable, decay; one half cosine; or constant after the warm-up."""

    warmup_steps: int = 100
    """Steps of linear warm-up."""

    decay_steps: int | None = None
    """`wsd`: steps of the final decay, 0 for none; null means a fifth of the run."""

    decay_shape: Literal["linear", "cosine", "inverse_sqrt"] = "linear"
    """`wsd`: how the learning rate falls."""

    min_lr_ratio: float = 0.1
    """The last learning rate as a fraction of `lr`."""


@dataclass
class PrecisionSection:
    """What the matrices are multiplied in; weights, moments and reductions are float32 always."""

    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU, and on a CPU where a measured matrix product is at least 1.5 times
    as fast in it.
    """

    matmul: Matmul = "compute"
    """What the linear layers of all decoder layers but the first and the last multiply in:
    `compute`, as above; `fp8`, rounded to 8 bits with a scale for each row, on Hopper and newer;
    `mxfp8`, with one for each 32 numbers, on Blackwell. They need torchao (`pip install
    'motifarch[low-precision]'`), bfloat16 and `compile` to be fast.
    """


@dataclass
class DistributedSection:
    """How long the ranks wait for one another."""

    timeout_first_s: float = 1800.0
    """Seconds that the first step (compilation, first data) may take, and a save or a validation at
    any time.
    """

    timeout_s: float = 600.0
    """Seconds without a finished step after which a run is taken for hung and ended, with every
    rank's stack. Lower finds a hang sooner; below the longest honest step it ends a healthy run.
    """


@dataclass
class CheckpointSection:
    """When the run is saved."""

    every: int = 500
    """Steps between checkpoints; the last step is saved always."""

    keep_last: int = 2
    """Complete checkpoints kept; older ones are deleted once a newer one is complete. 0 keeps all.
    """

    asynchronous: bool = True
    """Write in the background while training goes on."""


@dataclass
class AverageSection:
    """Going on from the mean of the last checkpoints' weights, as Motif-2.6B did; moments stay."""

    every: int = 0
    """Steps between averages, a multiple of `checkpoint.every`; 0 never averages."""

    last: int = 6
    """Checkpoints to average; fewer while the run has fewer."""


@dataclass
class ValidationSection:
    """When the validation loss is measured."""

    every: int = 500
    """Steps between validations; 0 never validates."""

    sequences: int = 64
    """Validation sequences, the same ones each time and for any number of ranks."""


@dataclass
class LogSection:
    """What is reported."""

    every: int = 10
    """Steps between reports. The device is waited for only then."""

    tensorboard: bool = True
    """Write TensorBoard event files too."""


@dataclass
class Recipe:
    """Everything that decides a run."""

    base: str | None = None
    """Another recipe's file, relative to this one's folder, whose values hold where this one gives
    none.
    """

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    batch: BatchSection = field(default_factory=BatchSection)
    optim: OptimSection = field(default_factory=OptimSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    parallel: Layout = field(default_factory=Layout)
    distributed: DistributedSection = field(default_factory=DistributedSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    average: AverageSection = field(default_factory=AverageSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    log: LogSection = field(default_factory=LogSection)

    activation_checkpointing: Recompute = "none"
    """What the backward pass recomputes: `none`; `full`, every layer: least memory, about a
    third more work; `selective`, all but matrix products and attention; or a number n, every n-th
    layer.
    """

    compile: bool = False
    """Compile each decoder layer with torch.compile."""


def check_recipe(recipe: Recipe, world_size: int = 1) -> None:
    """Refuse impossible values and combinations.

    Args:
        recipe: the recipe.
        world_size: number of ranks of the run.

    Raises:
        UserError: naming the field, its value and what is accepted.
    """
    run, batch, optim, data = recipe.run, recipe.batch, recipe.optim, recipe.data
    _at_least(
        1,
        {
            "run.steps": run.steps,
            "run.max_nonfinite_in_row": run.max_nonfinite_in_row,
            "run.max_nonfinite_total": run.max_nonfinite_total,
            "run.spike_max_in_row": run.spike_max_in_row,
            "model.vocab_multiple": recipe.model.vocab_multiple,
            "batch.size": batch.size,
            "batch.micro_size": batch.micro_size,
            "batch.warmup_start": batch.warmup_start,
            "batch.warmup_multiple": batch.warmup_multiple,
            "checkpoint.every": recipe.checkpoint.every,
            "average.last": recipe.average.last,
            "validation.sequences": recipe.validation.sequences,
            "log.every": recipe.log.every,
            "optim.muon_chunk_mib": optim.muon_chunk_mib,
        },
    )
    _at_least(
        0,
        {
            "run.seed": run.seed,
            "data.ramp_start": data.ramp_start,
            "batch.warmup_steps": batch.warmup_steps,
            "optim.lr": optim.lr,
            "optim.weight_decay": optim.weight_decay,
            "optim.z_loss": optim.z_loss,
            "optim.warmup_steps": optim.warmup_steps,
            "optim.decay_steps": optim.decay_steps,
            "optim.min_lr_ratio": optim.min_lr_ratio,
            "checkpoint.keep_last": recipe.checkpoint.keep_last,
            "average.every": recipe.average.every,
            "validation.every": recipe.validation.every,
        },
    )
    patience = recipe.distributed
    if not patience.timeout_s > 0:
        raise UserError(f"distributed.timeout_s is {patience.timeout_s}; it must be above 0 seconds")
    if not patience.timeout_first_s >= patience.timeout_s:
        raise UserError(
            f"distributed.timeout_first_s is {patience.timeout_first_s}, below distributed.timeout_s "
            f"({patience.timeout_s}); the first step takes longest, so give it at least as much"
        )
    checkpoint, average = recipe.checkpoint, recipe.average
    if average.every % checkpoint.every:
        raise UserError(
            f"average.every is {average.every}, which is no multiple of checkpoint.every ({checkpoint.every}): a mean "
            "is taken where a checkpoint has just been written"
        )
    if average.every and 0 < checkpoint.keep_last < average.last:
        raise UserError(
            f"checkpoint.keep_last is {checkpoint.keep_last}, but average.last needs {average.last} checkpoints; keep "
            "at least as many, or 0 for all"
        )
    if not data.datasets:
        raise UserError("data.datasets is empty; give at least one entry, for example {path: data/stdlib}")
    for i, entry in enumerate(data.datasets):
        _at_least(0, {f"data.datasets[{i}].weight": entry.weight, f"data.datasets[{i}].weight_end": entry.weight_end})
    if sum(d.weight for d in data.datasets) <= 0:
        raise UserError("data.datasets: every weight is 0; at least one must be above 0")
    if data.ramp_end < data.ramp_start:
        raise UserError(f"data.ramp_end is {data.ramp_end}, before data.ramp_start ({data.ramp_start})")
    _at_least(2, {"run.spike_window": run.spike_window})
    if run.spike_sigma is not None and not run.spike_sigma > 0:
        raise UserError(f"run.spike_sigma is {run.spike_sigma}; it must be above 0, or null to skip no spikes")
    if not all(0 <= b < 1 for b in optim.betas):
        raise UserError(f"optim.betas is {list(optim.betas)}; each must be at least 0 and below 1")
    if not 0 <= optim.momentum < 1:
        raise UserError(f"optim.momentum is {optim.momentum}; it must be at least 0 and below 1")
    if not optim.muon_lr_ratio > 0:
        raise UserError(f"optim.muon_lr_ratio is {optim.muon_lr_ratio}; it must be above 0")
    if optim.qk_clip is not None and not optim.qk_clip > 0:
        raise UserError(f"optim.qk_clip is {optim.qk_clip}; it must be above 0, or null for no clipping")
    if optim.qk_clip is not None and recipe.model.qk_norm:
        raise UserError(
            f"optim.qk_clip is {optim.qk_clip} and model.qk_norm is on: normalised queries and keys have bounded "
            "logits, and their projections' scale changes nothing; use one or the other"
        )
    if optim.clip is not None and optim.clip <= 0:
        raise UserError(f"optim.clip is {optim.clip}; it must be above 0, or null for no clipping")
    if optim.min_lr_ratio > 1:
        raise UserError(f"optim.min_lr_ratio is {optim.min_lr_ratio}; it must be between 0 and 1")
    if optim.eps <= 0:
        raise UserError(f"optim.eps is {optim.eps}; it must be above 0")
    if optim.schedule == "wsd" and optim.decay_shape == "inverse_sqrt" and optim.min_lr_ratio <= 0:
        raise UserError(
            "optim.min_lr_ratio is 0, which optim.decay_shape inverse_sqrt never reaches; use a ratio above 0"
        )
    decay = optim.decay_steps or 0
    if optim.schedule == "wsd" and optim.warmup_steps + decay > run.steps:
        raise UserError(
            f"optim.warmup_steps ({optim.warmup_steps}) and optim.decay_steps ({decay}) together exceed "
            f"run.steps ({run.steps}); shorten them or lengthen the run"
        )
    if optim.warmup_steps > run.steps:
        raise UserError(f"optim.warmup_steps is {optim.warmup_steps}, more than run.steps ({run.steps})")
    if batch.warmup_start is not None and batch.warmup_start > batch.size:
        raise UserError(f"batch.warmup_start is {batch.warmup_start}, more than batch.size ({batch.size})")
    if run.resume not in ("auto", "none") and run.init_from:
        raise UserError("run.resume names a checkpoint and run.init_from is set too; choose one of them")
    check_activation_checkpointing(recipe.activation_checkpointing)
    layout = recipe.parallel.resolve(world_size)
    if batch.size % layout.data_parallel_size:
        raise UserError(
            f"batch.size is {batch.size}, which {layout.data_parallel_size} ranks can't share evenly; "
            f"use a multiple of {layout.data_parallel_size}"
        )


def _at_least(lowest: float, fields: dict[str, float | int | None]) -> None:
    for name, value in fields.items():
        # The comparison is written so that NaN fails it.
        if value is not None and not value >= lowest:
            raise UserError(f"{name} is {value}; it must be at least {lowest}")
