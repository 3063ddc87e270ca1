"""Optimizers, schedules, guards against bad steps, averages of checkpoints."""

from motifarch.optim.adamw import build_adamw, parameter_groups
from motifarch.optim.averaging import CheckpointMean
from motifarch.optim.build import build_muon, build_optimizer
from motifarch.optim.clip import clip_gradients
from motifarch.optim.expert_balance import update_expert_biases
from motifarch.optim.muon import Muon
from motifarch.optim.newton_schulz import NS_COEFFICIENTS, newton_schulz
from motifarch.optim.offload import offload_state
from motifarch.optim.qk_clip import clip_heads, clip_layers
from motifarch.optim.schedule import build_schedule, cosine, wsd
from motifarch.optim.skip_nonfinite import step_if_finite
from motifarch.optim.spike_guard import SpikeGuard

__all__ = [
    "NS_COEFFICIENTS",
    "CheckpointMean",
    "Muon",
    "SpikeGuard",
    "build_adamw",
    "build_muon",
    "build_optimizer",
    "build_schedule",
    "clip_gradients",
    "clip_heads",
    "clip_layers",
    "cosine",
    "newton_schulz",
    "offload_state",
    "parameter_groups",
    "step_if_finite",
    "update_expert_biases",
    "wsd",
]
