"""What a recipe changes from step to step besides the learning rate: the noise on the logits that
experts are chosen by, and the factor of hyper-connections' outputs. Both follow from the number of
steps done alone, so that a run which resumes goes on as if it had not stopped.
"""

import math

import torch
from torch import nn

from motifarch.layers import HyperConnections, MixtureOfExperts
from motifarch.models.motif import MotifForCausalLM
from motifarch.train.recipe import Recipe


def router_noise(recipe: Recipe, step: int) -> float:
    """The standard deviation of the noise on routers' logits after so many steps: half a cosine
    from `experts.router_noise` to 0.
    """
    experts = recipe.experts
    steps = recipe.run.steps if experts.router_noise_steps is None else experts.router_noise_steps
    return experts.router_noise * 0.5 * (1 + math.cos(math.pi * step / steps)) if step < steps else 0.0


def post_alpha(recipe: Recipe, step: int) -> float:
    """The alpha of hyper-connections after so many steps: a line from 1 to
    `model.mhc_h_post_alpha_end`.
    """
    end, steps = recipe.model.mhc_h_post_alpha_end, recipe.optim.mhc_post_alpha_steps
    return 1 + (end - 1) * step / steps if step < steps else end


class Annealing:
    """Sets both in a run's model.

    A value on its way is a tensor on the device: torch.compile would take a number for a constant,
    and compile every layer anew in each step.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device) -> None:
        self._recipe = recipe
        self._experts = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
        self._connections = [module for module in model.modules() if isinstance(module, HyperConnections)]
        self._noise, self._alpha = torch.zeros((), device=device), torch.zeros((), device=device)

    def set(self, step: int) -> None:
        """Sets what holds after so many steps."""
        noise, alpha = router_noise(self._recipe, step), post_alpha(self._recipe, step)
        self._noise.fill_(noise)
        self._alpha.fill_(alpha)
        for experts in self._experts:
            experts.router_noise = self._noise if noise else 0.0  # type: ignore[assignment]
        moving = step < self._recipe.optim.mhc_post_alpha_steps
        for connections in self._connections:
            connections.post_alpha = self._alpha if moving else alpha  # type: ignore[assignment]


def set_expert_losses(model: MotifForCausalLM, recipe: Recipe, seq_len: int) -> None:
    """Gives a model's experts the coefficients of their losses, and the tokens of a sequence: these
    losses are those of each, however many a micro-batch has.
    """
    experts, last = recipe.experts, len(model.model.layers) - 1
    for i, layer in model.model.expert_layers().items():
        layer.balance_loss_coeff = experts.balance_loss_by_layer.get(i, experts.balance_loss)
        layer.magnitude_loss_coeff = experts.magnitude_loss
        layer.sequence_length = seq_len
        layer.magnitude_threshold = experts.magnitude_threshold_last if i == last else experts.magnitude_threshold
