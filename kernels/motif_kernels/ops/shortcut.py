"""A shortcut past torch's dispatcher for operators that nobody looks at.

An operator of torch.library goes through Python several times on its way: that costs more than the
arithmetic of a short call, each way. In plain eager mode nothing is gained by it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

Function = Callable[..., Any]


def is_unwatched(*arguments: Any) -> bool:
    """Whether no one traces, transforms (torch.func) or watches (a dispatch mode, as
    FlopCounterMode) a call, and its tensors have data and no subclass, which would see it too.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(t) in (Tensor, Parameter) and not t.is_meta for t in arguments if isinstance(t, Tensor))
    )


def with_shortcut(operator: CustomOpDef, run: Function) -> Function:
    """``operator``, or where it is unwatched ``run``, which it is made of: without a derivative."""

    def call(*arguments: Any) -> Any:
        return run(*arguments) if is_unwatched(*arguments) else operator(*arguments)

    return call


def differentiable(
    operator: CustomOpDef, run: Function, save: Function, differentiate: Function, *, outputs: int = 1
) -> Function:
    """Give an operator the derivative of its first outputs, and a shortcut that has the same.

    Args:
        operator: made of ``run``.
        run: the arguments -> what the operator returns, one tensor or more.
        save: keeps what the backward pass needs, as torch.library's ``setup_context``.
        differentiate: ``(ctx, *grads)``, of which only the first ``outputs`` may be there, and one
            is -> a gradient for each argument. It calls the backward operator through
            :func:`with_shortcut`.
        outputs: how many have a derivative.

    Returns:
        The operator, or where it is unwatched the same arithmetic without it.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, output)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[outputs:])
        # Autograd would make zeros for the others, each as large as the output.
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads[:outputs]):
            return (None,) * len(ctx.needs_input_grad)
        return tuple(differentiate(ctx, *grads))

    operator.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    # Named for error messages and profilers.
    members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    function: Any = type(operator._qualname, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if not is_unwatched(*arguments):
            return operator(*arguments)
        recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
        return function.apply(*arguments) if recorded else run(*arguments)

    return call
