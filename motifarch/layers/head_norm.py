"""RMS norms of attention's heads (arXiv 1910.07467): of queries and keys, and the sub-norm."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from motif_kernels import rms_norm
from motifarch.layers.group_sum import sum_gradient
from motifarch.layers.rms_norm import RMSNorm


class HeadNorm(RMSNorm):
    """RMSNorm over each head's width, with one weight for all heads.

    Arguments are those of RMSNorm.
    """

    group: ProcessGroup | None = None
    """Ranks that share the heads (tensor parallelism), set from outside: each one's heads give a
    part of the weight's gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., heads, width)."""
        return rms_norm(x, self._shared_weight(), self.eps)

    def _shared_weight(self) -> Tensor:
        return sum_gradient(self.weight, self.group)


class SubNorm(HeadNorm):
    """The norm of each head's output (arXiv 2410.05258), which attention's kernels apply before
    they round.

    A kernel takes the norm's weight. So the norm is called with what attention reads, and calls
    attention: whatever hooks, wraps, shards or offloads modules sees it called with tensors that
    are read and one that is made, and it is only here that its weight is used.
    """

    def forward(self, x: Any, attend: Callable[..., Tensor] | None = None) -> Tensor:
        """Attention of x, normalised.

        Args:
            x: attention's tensors, a tuple; or a tensor (..., width) to normalise.
            attend: attention: called with x, ``norm_weight=`` and ``norm_eps=``; with x a tuple.

        Returns:
            Tensor (..., width).
        """
        if attend is None:
            return super().forward(x)
        return attend(x, norm_weight=self._shared_weight(), norm_eps=self.eps or 0.0)


def attend_normed(subln: nn.Module | None, out_scale: float, inputs: Any, attend: Callable[..., Tensor]) -> Tensor:
    """Attention, its sub-norm and scale.

    Args:
        subln: a SubNorm; None; or another module that takes a tensor (what wraps a norm, or was put
            in its place), which follows attention.
        out_scale: multiplies the result.
        inputs: attention's tensors, a tuple.
        attend: called with inputs, ``norm_weight=``, ``norm_eps=`` and ``out_scale=``.
    """
    if isinstance(subln, SubNorm):
        return subln(inputs, partial(attend, out_scale=out_scale))  # type: ignore[no-any-return]
    if subln is None:
        return attend(inputs, norm_weight=None, norm_eps=0.0, out_scale=out_scale)
    return subln(attend(inputs, norm_weight=None, norm_eps=0.0, out_scale=1.0)) * out_scale  # type: ignore[no-any-return]
