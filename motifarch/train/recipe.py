"""The recipe of a run: one typed dataclass a section.

Every field can be overridden by its dotted name, for example ``--optim.lr 3e-4``. A field's type
says what it accepts; `motifarch.train.recipe_rules` has what holds between fields.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from motifarch.field_types import (
    Count,
    Decay,
    FilePath,
    Fraction,
    Layers,
    LearningRate,
    LossByLayer,
    Matmul,
    Multiplier,
    PositiveCount,
    Rows,
    Seconds,
    Seed,
    Weight,
)
from motifarch.layout import Layout
from motifarch.model_section import ModelSection
from motifarch.typed_yaml import Section, TypedYaml


@dataclass
class RunSection(Section):
    """What is run, how long, and where its files go."""

    output: FilePath = "runs/default"
    """Folder for everything that the run writes."""

    steps: PositiveCount = 1000
    """Optimizer steps of the whole run, those before a resume included."""

    stop_at: PositiveCount | None = None
    """Save and end after this step of the whole run; the same command with another goes on."""

    seed: Seed = 0
    """Seeds the model's first weights and the order of the data."""

    resume: FilePath = "auto"
    """`auto`: the output's newest checkpoint, else from scratch; `none`; or a checkpoint."""

    init_from: FilePath | None = None
    """First weights: a checkpoint or a Hugging Face folder; all else starts afresh."""

    max_nonfinite_in_row: PositiveCount = 10
    """Stop when so many steps in a row had a non-finite loss or gradient."""

    max_nonfinite_total: PositiveCount = 100
    """Stop when this many steps of the whole run had a non-finite loss or gradient."""

    spike_sigma: Multiplier | None = None
    """Skip a step whose loss or gradient norm is more than this many standard deviations above the
    mean of the last accepted steps; null skips none. A low value (3) skips honest steps too, a high
    one (10) only the worst; OLMo-core takes 6.
    """

    spike_window: Annotated[int, Field(ge=2, le=10**6)] = 128
    """Accepted steps that a step is compared with; none is skipped before there are so many. A long
    window steadies the statistics but falls behind a loss that changes fast.
    """

    spike_max_in_row: PositiveCount = 10
    """After this many spikes one after another the next step is accepted and the window starts
    again: the level has changed for good. Higher sits out longer stretches of bad data, and loses
    as many steps to a change that is real.
    """


@dataclass
class DatasetEntry(Section):
    """One prepared dataset of the mixture."""

    path: FilePath
    """A folder written by `motifarch data prepare`."""

    weight: Weight = 1.0
    """Share of the samples, relative to the other datasets' weights."""

    weight_end: Weight | None = None
    """The share once the ramp has ended; null keeps `weight`."""


@dataclass
class DataSection(Section):
    """What is read."""

    datasets: list[DatasetEntry] = field(default_factory=list)
    """The mixture, one entry a prepared dataset."""

    ramp_start: Count = 0
    """Step at which the weights begin to move towards `weight_end`."""

    ramp_end: Count = 0
    """Step at which they arrive."""


@dataclass
class BatchSection(Section):
    """How many sequences make a step."""

    size: Rows = 32
    """Sequences in a global batch, over all ranks."""

    micro_size: Rows = 8
    """Sequences that one rank runs through the model at once; the rest is accumulated."""

    warmup_start: Rows | None = None
    """Global batch at step 0, growing linearly to `size`; null starts at `size`."""

    warmup_steps: Count = 0
    """Steps that the growth takes."""

    warmup_multiple: Rows | None = None
    """Batch sizes on the way are multiples of this; null takes ranks x micro_size."""

    balance: bool = False
    """Deal a step's rows to ranks by the attention work of their documents, so that none waits long
    for another. The step's rows stay the same: losses change by rounding alone. Each rank reads the
    documents' lengths of all rows of the step, ahead of it.
    """


@dataclass
class OptimSection(Section):
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the matrices inside the decoder layers, with AdamW for all else."""

    lr: LearningRate = 5e-4
    """Peak learning rate."""

    muon_lr_ratio: Multiplier = 1.0
    """`muon`: multiplies `lr` for Muon's matrices, whose updates have the size of AdamW's at 1."""

    momentum: Decay = 0.95
    """`muon`: decay rate of the mean gradient (Nesterov's)."""

    ns_coefficients: Literal["polar_express", "keller_jordan"] = "polar_express"
    """`muon`: the five Newton-Schulz steps' polynomials: one each, or one for all."""

    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """`muon`: what Newton-Schulz computes in and ranks send; float32 is for comparing runs."""

    muon_chunk_mib: Annotated[int, Field(ge=1, le=2**20)] = 128
    """`muon`: MiB of whole matrices gathered at once: less memory or larger messages."""

    qk_clip: Multiplier | None = None
    """After each step, scale query and key heads whose largest logit was above this back to it
    (MuonClip; 100 is Kimi K2's); null leaves them.
    """

    offload: bool = False
    """Keep the moments in CPU memory, on the GPU only while they are updated: frees 8 bytes a
    parameter of AdamW's (4 of Muon's) on the rank that holds it, and moves as much over the bus
    each way in every step. Results stay the same in every bit.
    """

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""

    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    """AdamW's epsilon."""

    weight_decay: Weight = 0.1
    """Decoupled weight decay of matrices; norms, lambdas, PolyNorm, all vectors have none."""

    decay_embeddings: bool = True
    """Whether the embedding matrix is decayed too."""

    clip: Multiplier | None = 1.0
    """Largest global gradient norm; null never clips."""

    z_loss: Fraction = 0.0
    """Weight of mean(logsumexp(logits)^2), which keeps logits from drifting."""

    mtp_loss: Multiplier = 0.2
    """`model.num_nextn_predict_layers`: weight of the cross-entropy of the token after the next
    one (nats/token); Motif-3's.
    """

    mhc_post_alpha_steps: Count = 0
    """`model.mhc_enabled`: steps in which alpha goes linearly from 1, where a sublayer's output is
    multiplied by up to 2, to `model.mhc_h_post_alpha_end`; 0 has that from the start, as a run that
    begins with a trained model's weights wants. Motif-3 went from 1 to 0 in pretraining; over how
    many steps and in which shape is not published: the line is ours.
    """

    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Warm-up, stable, decay; one half cosine; or constant after the warm-up."""

    warmup_steps: Count = 100
    """Steps of linear warm-up."""

    decay_steps: Count | None = None
    """`wsd`: steps of the final decay, 0 for none; null means a fifth of the run."""

    decay_shape: Literal["linear", "cosine", "inverse_sqrt"] = "linear"
    """`wsd`: how the learning rate falls."""

    min_lr_ratio: Fraction = 0.1
    """The last learning rate as a fraction of `lr`."""


@dataclass
class ExpertsSection(Section):
    """How routed experts are kept equally busy and their outputs small. Without
    `model.num_experts` there is nothing to set; defaults are Motif-3's.
    """

    bias_rate: Fraction = 1e-3
    """After each step, the bias that an expert is chosen by rises by this where it got fewer tokens
    than the mean over all ranks, else falls (DeepSeek-V3, arXiv 2412.19437); 0 keeps biases.
    Motif-3 took 1e-3 in pretraining and 1e-4 in fine-tuning.
    """

    balance_loss: Weight = 1e-4
    """Weight of the loss that balances loads within each sequence, which is 1 for a layer in
    balance; 0 for none. Each row of the data is a sequence, however many are computed at once.
    """

    balance_loss_by_layer: LossByLayer = field(default_factory=dict)
    """Other weights of it by a layer's index, from 0. Motif-3 has {2: 2.4e-4, 3: 2.0e-4, 4: 2.0e-4,
    5: 2.0e-4}.
    """

    magnitude_loss: Weight = 2e-4
    """Weight of mean(relu(|y| - threshold)^2) of the outputs y of layers with experts; 0 for none.
    """

    magnitude_threshold: Weight = 128.0
    """The threshold: what an output's magnitude may be for nothing."""

    magnitude_threshold_last: Weight = 1024.0
    """The threshold in the model's last layer."""

    router_noise: Weight = 0.0
    """Standard deviation of Gaussian noise on the logits that experts are chosen by, at the first
    step; then half a cosine down to 0. That Motif-3 has such noise is published, but not how much.
    Drawn by `run.seed`, step and rank.
    """

    router_noise_steps: PositiveCount | None = None
    """Steps after which that noise is 0; null means all of the run's."""


@dataclass
class LoraSection(Section):
    """Low-rank adapters (LoRA) that are trained in place of the model's weights, by peft."""

    rank: Annotated[int, Field(ge=0, le=2**14)] = 0
    """Rank of the adapters; 0 has none and trains all weights."""

    alpha: Annotated[int, Field(ge=1, le=2**20)] = 16
    """Adapters are multiplied by alpha / rank."""

    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of each decoder layer that get an adapter."""

    dropout: Decay = 0.0
    """Part of an adapter's inputs that a step leaves out, chosen by seed, step and rank."""


@dataclass
class PrecisionSection(Section):
    """What the matrices are multiplied in; weights, moments and reductions are float32 always."""

    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU, and on a CPU where it is at least 1.5 times as fast."""

    matmul: Matmul = "compute"
    """What the linear layers of all decoder layers but the first and the last multiply in:
    `compute`, as above; `fp8`, rounded to 8 bits with a scale for each row, on Hopper and newer;
    `mxfp8`, with one for each 32 numbers, on Blackwell, of routed experts too (`fp8` leaves those).
    Routers and hyper-connections stay. They need torchao (`pip install
    'motifarch[low-precision]'`), bfloat16 and `compile` to be fast.
    """


@dataclass
class DistributedSection(Section):
    """How long the ranks wait for one another."""

    timeout_first_s: Seconds = 1800.0
    """Seconds that the first step may take, and any save or validation."""

    timeout_s: Seconds = 600.0
    """Seconds without a finished step after which a run is taken for hung and ended, with every
    rank's stack. Lower finds a hang sooner; below the longest honest step it ends a healthy run.
    """


@dataclass
class CheckpointSection(Section):
    """When the run is saved."""

    every: PositiveCount = 500
    """Steps between checkpoints; the last step is saved always."""

    keep_last: Count = 2
    """Complete checkpoints kept; older ones are deleted once a newer is complete. 0 keeps all."""

    asynchronous: bool = True
    """Write in the background while training goes on."""

    mirror: FilePath | None = None
    """URL of the run's folder in object storage (s3://bucket/run, gs://...): complete checkpoints
    are copied there, and a run whose own folder lacks them resumes from there.
    """

    sign_with: FilePath | None = None
    """An ed25519 private key, as `ssh-keygen -t ed25519` makes it, that signs the ledger."""


@dataclass
class AverageSection(Section):
    """Going on from the mean of the last checkpoints' weights, as Motif-2.6B did; moments stay."""

    every: Count = 0
    """Steps between averages, a multiple of `checkpoint.every`; 0 never averages."""

    last: PositiveCount = 6
    """Checkpoints to average; fewer while the run has fewer."""


@dataclass
class ValidationSection(Section):
    """When the validation loss is measured."""

    every: Count = 500
    """Steps between validations; 0 never validates."""

    sequences: PositiveCount = 64
    """Validation sequences, the same ones each time and for any number of ranks."""


@dataclass
class LogSection(Section):
    """What is reported."""

    every: PositiveCount = 10
    """Steps between reports. The device is waited for only then."""

    tensorboard: bool = True
    """Write TensorBoard event files too."""

    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Where the figures go besides: Weights & Biases or Trackio (`pip install 'motifarch[wandb]'`,
    `'motifarch[trackio]'`). Their own environment variables hold, such as `WANDB_MODE=offline`.
    """

    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "motifarch"
    """`wandb`, `trackio`: the project that the run, named as its folder, belongs to."""


@dataclass
class Recipe(Section):
    """Everything that decides a run."""

    base: FilePath | None = None
    """Another recipe's file, relative to this one, for values not given here."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    batch: BatchSection = field(default_factory=BatchSection)
    optim: OptimSection = field(default_factory=OptimSection)
    experts: ExpertsSection = field(default_factory=ExpertsSection)
    lora: LoraSection = field(default_factory=LoraSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    parallel: Layout = field(default_factory=Layout)
    distributed: DistributedSection = field(default_factory=DistributedSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    average: AverageSection = field(default_factory=AverageSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    log: LogSection = field(default_factory=LogSection)

    activation_checkpointing: Literal["none", "full", "selective"] | Layers = "none"
    """What the backward pass recomputes: `none`; `full`, every layer: least memory, a third more
    work; `selective`, all but matrix products and attention; or a number n, every n-th layer.
    """

    compile: bool = False
    """Compile each decoder layer with torch.compile."""


RECIPES = TypedYaml(
    Recipe,
    "recipe",
    usage="motifarch train RECIPE [--section.field VALUE ...]",
    description="Train a language model as a recipe says. RECIPE is a file, or the name of one that comes with the "
    "package (`motifarch recipes` lists them). The same command resumes a run that was stopped.",
    examples=[
        "motifarch train tiny_cpu",
        "motifarch train my.yaml --optim.lr 3e-4 --run.output runs/lower_rate",
        "torchrun --standalone --nproc-per-node 8 -m motifarch.train my.yaml",
        "motifarch train --help optim",
    ],
)
