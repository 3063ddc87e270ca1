"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): several residual streams, which
doubly stochastic matrices mix.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from motif_kernels import read_streams, reference, stream_maps, update_streams
from motifarch.layers.linear_weight import is_plain
from motifarch.layers.rms_norm import RMSNorm
from motifarch.layers.wide_linear import WideLinear


def expand_streams(x: Tensor, num_streams: int) -> Tensor:
    """(..., E) as so many equal streams (..., num_streams, E), a view."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], num_streams, x.shape[-1])


def merge_streams(streams: Tensor) -> Tensor:
    """The mean of streams (..., n, E): (..., E)."""
    return streams.mean(dim=-2)


class XavierLinear(WideLinear):
    """One that starts with Xavier's uniform weights."""

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.xavier_uniform_(self.weight)


class HyperConnections(nn.Module):
    """Residual streams around a sublayer.

    With streams X (n, E) of a token, the sublayer is given ``sum_i pre_i X_i``, and its output o
    goes to all: ``X'_i = sum_j H_ij X_j + post_i o``. The gates ``pre`` and ``post`` and the
    doubly stochastic H are read off the normalised streams; that arithmetic and both sums are in
    float32 (float64 for float64 inputs). Where a model keeps n streams,
    :func:`~motifarch.layers.expand_streams` makes them of the embeddings and
    :func:`~motifarch.layers.merge_streams` takes the mean in the end.

    A residual block of one's own is a sublayer too, its own residual taken out, such as a decoder
    layer of transformers::

        connections = HyperConnections(config.hidden_size)
        streams = expand_streams(hidden_states, 4)
        streams = connections(streams, lambda x: layer(x, position_embeddings=positions) - x)

    Args:
        hidden_size: E.
        num_streams: n, 2 or more.
        sinkhorn_iters: iterations that make H.
        identity_init: start as a plain residual block, exactly so if ``post_alpha`` is 1: gates
            that take the mean and add all of the output, H near 1.
        post_alpha: the gates ``post`` are ``(1 + post_alpha) * sigmoid``. A plain attribute, which
            training may move.
        norm_eps: epsilon of the streams' norm.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: num_streams is below 2.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_streams: int = 4,
        sinkhorn_iters: int = 20,
        identity_init: bool = False,
        post_alpha: float = 0.0,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_streams < 2:
            raise ValueError(
                f"num_streams is {num_streams}; it must be 2 or more: with one there is nothing to mix, use a plain "
                "residual"
            )
        self.hidden_size, self.num_streams, self.sinkhorn_iters = hidden_size, num_streams, sinkhorn_iters
        self.identity_init, self.post_alpha = identity_init, post_alpha
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_streams * hidden_size
        self.rms_norm = RMSNorm(width, eps=norm_eps, **made)
        self.proj_pre = XavierLinear(width, num_streams, **made)
        self.proj_post = XavierLinear(width, num_streams, **made)
        self.proj_res = XavierLinear(width, num_streams * num_streams, **made)
        self.alpha_pre = nn.Parameter(torch.empty(1, **made))
        self.alpha_post = nn.Parameter(torch.empty(1, **made))
        self.alpha_res = nn.Parameter(torch.empty(1, **made))
        self.bias_pre = nn.Parameter(torch.empty(num_streams, **made))
        self.bias_post = nn.Parameter(torch.empty(num_streams, **made))
        self.bias_res = nn.Parameter(torch.empty(num_streams, num_streams, **made))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Alphas and biases; the norm and the projections have their own."""
        alphas = self.alpha_pre, self.alpha_post, self.alpha_res
        nn.init.zeros_(self.bias_post)
        if self.identity_init:
            for alpha in alphas:
                nn.init.zeros_(alpha)
            nn.init.constant_(self.bias_pre, -math.log(self.num_streams - 1))  # of which the sigmoid is 1/n
            nn.init.eye_(self.bias_res).sub_(1).mul_(10)
        else:
            for parameter in (*alphas, self.bias_res):
                nn.init.normal_(parameter, std=0.1)
            nn.init.zeros_(self.bias_pre)

    def read(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the sublayer is given (..., E), the gates post (..., n) and H (..., n, n), of
        streams (..., n, E).
        """
        n, dtype = self.num_streams, torch.promote_types(streams.dtype, torch.float32)
        alphas = (self.alpha_pre, n), (self.alpha_post, n), (self.alpha_res, n * n)
        scale = torch.cat([alpha.to(dtype).expand(times) for alpha, times in alphas])
        bias = torch.cat((self.bias_pre, self.bias_post, self.bias_res.flatten()))
        projections = self.proj_pre, self.proj_post, self.proj_res
        if is_plain(self.rms_norm, RMSNorm) and all(is_plain(p, XavierLinear) for p in projections):
            # Norm, projections and alphas are one small matrix: the streams are read as they are,
            # and no normalised copy, four times as wide as a hidden state, is made or kept.
            weight = scale[:, None] * torch.cat([p.weight for p in projections]) * self.rms_norm.weight
            read, products = read_streams(streams, weight, bias[:n], eps=self.rms_norm.eps or 0.0)
        else:
            normed = self.rms_norm(streams.flatten(-2).to(torch.promote_types(streams.dtype, self.alpha_pre.dtype)))
            products = scale * torch.cat([p(normed) for p in projections], dim=-1)
            read = reference.reduce_streams(streams, products, bias[:n])
        post, mix = stream_maps(products, bias[n:], iterations=self.sinkhorn_iters)
        return read, (1 + self.post_alpha) * post, mix

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Any]) -> Any:
        """Streams (..., n, E), through the sublayer -> (..., n, E).

        Args:
            streams: the residual streams.
            sublayer: from (..., E) to (..., E), or to that and something else.

        Returns:
            The streams; of a sublayer that gives something else too, a pair with that.

        Raises:
            ValueError: streams of another number or width.
        """
        if streams.shape[-2:] != (self.num_streams, self.hidden_size):
            raise ValueError(
                f"streams has shape {tuple(streams.shape)}; it must end with ({self.num_streams} streams, "
                f"{self.hidden_size}): expand_streams makes them"
            )
        read, post, mix = self.read(streams)
        out = sublayer(read)
        out, *extra = out if isinstance(out, tuple) else (out,)
        streams = update_streams(streams, out, post, mix)
        return (streams, *extra) if extra else streams

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"{self.hidden_size}, num_streams={self.num_streams}, sinkhorn_iters={self.sinkhorn_iters}, "
            f"post_alpha={self.post_alpha}"
        )
