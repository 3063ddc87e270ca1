"""torch.compile of decoder layers, one by one, so that FSDP2 gathers and frees each."""

import torch
from torch import nn

from motifarch.decoder_layers import decoder_layers

# Calls to compile for: with and without gradients, packed or not, lengths that vary.
_CALLS = 8


def apply_compile(model: nn.Module) -> None:
    """Lets each decoder layer be compiled when it is first called, in place.

    Settings of torch.compile are changed for this process. The layers are one piece of code to it,
    and differ in numbers such as lambda_init: taken for variables, these reach inductor's code
    (torch 2.13), once lengths vary, with another value, and results are wrong without a word. So
    numbers are constants, and the code may be compiled as often as there are layers. And what a
    layer notes of its forward pass (lambda, largest logits) need not be noted again when activation
    checkpointing repeats it: where it must, a checkpointed layer is not compiled at all.
    """
    layers = decoder_layers(model)
    config = torch._dynamo.config
    config.specialize_float = True
    config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    config.recompile_limit = max(config.recompile_limit, _CALLS * len(layers))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    for layer in layers:
        layer.compile()
