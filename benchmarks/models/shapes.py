"""The models and batches that the training-step benchmark knows by name, and the peaks of GPUs."""

import dataclasses
import re
from dataclasses import dataclass

from benchmarks.models.providers import LLAMAS, PROVIDERS, Sizes
from motifarch.hardware import GPUS, Gpu

MOTIF_2_6B = Sizes(
    hidden_size=2048,
    num_layers=32,
    head_dim=128,
    vocab_size=219_520,
    intermediate_size=8192,
    max_positions=4096,
    tied=True,
)
_CUT = 8


@dataclass(frozen=True)
class Shape:
    """What a name stands for; every part of it can be given on the command line instead."""

    text: str
    sizes: Sizes
    """max_positions aside, which is the longest length."""
    seq_lens: tuple[int, ...]
    tokens_per_step: int
    precisions: tuple[str, ...]
    models: tuple[str, ...]
    """Most important first; those that cannot run are left out."""


SHAPES = {
    "small": Shape(
        text="23 million parameters, for a CPU",
        sizes=Sizes(),
        seq_lens=(512, 2048),
        tokens_per_step=2048,
        precisions=("float32", "bf16"),
        models=tuple(PROVIDERS),
    ),
    "300m": Shape(
        text="300 million parameters: GDA 4:1 is that of recipes/ablation_300m, its batch a rank's",
        sizes=Sizes(
            hidden_size=1024, num_layers=20, head_dim=64, vocab_size=32_000, intermediate_size=2880, tied=True
        ),
        seq_lens=(4096,),
        tokens_per_step=16_384,
        precisions=("bf16",),
        models=("gda", *LLAMAS, "diff_v1", "softmax"),
    ),
    "2.6b": Shape(
        text=f"Motif-2.6B's shape, {32 // _CUT} of its 32 layers and as large a share of its vocabulary, so that each "
        "part keeps its share of the whole model's step",
        sizes=dataclasses.replace(MOTIF_2_6B, num_layers=32 // _CUT, vocab_size=219_520 // _CUT),
        seq_lens=(4096,),
        tokens_per_step=16_384,
        precisions=("bf16",),
        models=("gda", *LLAMAS, "diff_v1", "gda_narrow", "softmax"),
    ),
}  # fmt: skip


def find_peak(device_name: str) -> tuple[Gpu | None, str]:
    """The GPU whose dense bf16 peak is MFU's denominator.

    Args:
        device_name: as torch.cuda.get_device_name says it, such as "NVIDIA H100 80GB HBM3".

    Returns:
        The GPU, or None for one that `motifarch plan` does not know; and a sentence for people.
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    # Boards of the same name with a lower peak, and slices of one.
    other = words & {"pcie", "nvl", "mig"}
    gpu = next((gpu for name, gpu in GPUS.items() if name in words and not other), None)
    if gpu is None:
        return None, f"no MFU: the dense bf16 peak of {device_name} is not known here"
    return gpu, f"MFU is of {gpu.bf16_flops / 1e12:,.0f} TFLOP/s, the dense bf16 peak of {gpu.name}"
