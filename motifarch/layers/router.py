"""Which experts each token goes to, with what weights."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motif_kernels import expert_weights, select_experts
from motif_kernels.routing import SCORE_FUNCTIONS
from motifarch.layers.autocast import without_autocast
from motifarch.layers.recorded import RecordedOperator


class Routing(NamedTuple):
    """A token's experts; weights and scores are float32 (float64 for float64 inputs)."""

    selected: Tensor  # (T, k) int64
    weights: Tensor  # (T, k)
    scores: Tensor  # (T, num_experts), without the selection bias


def _selected(logits: Tensor, bias: Tensor | None, top_k: int, score_func: str) -> Tensor:
    return select_experts(logits, bias, top_k, score_func=score_func)


def _selected_fake(logits: Tensor, bias: Tensor | None, top_k: int, score_func: str) -> Tensor:
    return logits.new_empty(logits.shape[0], top_k, dtype=torch.int64)


_select = RecordedOperator("motifarch::select_experts", _selected, _selected_fake)


class Float32Linear(nn.Linear):
    """A linear layer in float32 whatever the dtypes, under autocast too: rounding its logits would
    send tokens elsewhere.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Scores every expert for each token and takes the best.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 12 to 16.

    Args:
        hidden_size: E.
        num_experts: how many there are.
        top_k: how many a token goes to.
        route_norm: divide a token's weights by their sum.
        route_scale: multiplies the weights, after that.
        score_func: "sigmoid" or "softmax" of the logits.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: top_k is not 1 to num_experts, or a score_func that is not known.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        top_k: int,
        route_norm: bool = True,
        route_scale: float = 1.0,
        score_func: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k is {top_k} with num_experts {num_experts}; it must be 1 to {num_experts}, for a token goes to "
                "an expert once: lower top_k, or add experts"
            )
        if score_func not in SCORE_FUNCTIONS:
            raise ValueError(f"score_func is {score_func!r}; it must be one of {', '.join(map(repr, SCORE_FUNCTIONS))}")
        self.top_k, self.route_norm, self.route_scale, self.score_func = top_k, route_norm, route_scale, score_func
        self.gate = Float32Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, bias: Tensor | None = None, noise: float | Tensor = 0.0) -> Routing:
        """Route tokens x (T, E).

        Args:
            x: the tokens.
            bias: (num_experts,), added to scores for the selection only; no gradient.
            noise: standard deviation of Gaussian noise that is added to the logits, drawn from
                torch's global generator of the device.
        """
        logits: Tensor = self.gate(x)
        if isinstance(noise, Tensor) or noise:  # a tensor is not asked for its value
            logits = logits + torch.randn_like(logits).mul_(noise)
        selected = _select(logits, bias, self.top_k, self.score_func)
        options: dict[str, Any] = {"normalise": self.route_norm, "scale": self.route_scale}
        weights, scores = expert_weights(logits, selected, score_func=self.score_func, **options)
        return Routing(selected, weights, scores)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"top_k={self.top_k}, route_norm={self.route_norm}, route_scale={self.route_scale}, "
            f"score_func={self.score_func!r}"
        )


def share_of_scores(scores: Tensor) -> Tensor:
    """What a score is multiplied with to be a share of its token's: (..., experts) to (..., 1)."""
    return 1 / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def entropy_of_shares(scores: Tensor) -> Tensor:
    """Of the shares that experts have of each token's scores, in nats: (T, experts) to (T,)."""
    # The sum of -s/S log(s/S), without a copy of the shares.
    summed = scores.sum(dim=-1)
    total = summed + 1e-20
    return (torch.special.entr(scores).sum(dim=-1) + summed * total.log()) / total


def balance_sums(scores: Tensor, selected: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """What the balance loss of a sequence is made of.

    Args:
        scores: (B, S, num_experts).
        selected: (B, S, k).
        counted: (B, S, 1), 1 for a token that counts, else 0; of scores' dtype.

    Returns:
        Two (B, num_experts): how many tokens chose each expert, and the sum of the shares that it
        has of the tokens' scores.
    """
    # Sums at once: a mask of choices and the shares would each be as large as the scores.
    chosen = scores.new_zeros(scores.shape[0], scores.shape[2])
    chosen.scatter_add_(1, selected.flatten(1), counted.expand(selected.shape).flatten(1))  # exact in any order
    return chosen, ((counted * share_of_scores(scores)).mT @ scores).squeeze(1)


def balance_loss(chosen: Tensor, probability: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """The balance loss of each sequence: 1 where its tokens are spread evenly over the experts.

    ``sum_i f_i P_i``, with f_i the share of the sequence's slots that chose expert i, times the
    number of experts, and P_i the mean of the share that i has of a token's scores. Source:
    DeepSeek-V3, arXiv 2412.19437, equations 17 to 20, with the choices as they were made.

    Args:
        chosen: (..., num_experts), the first of `balance_sums` over a sequence's tokens.
        probability: (..., num_experts), the second.
        tokens: (..., 1), how many were summed, at least 1.
        top_k: choices of a token.

    Returns:
        (..., 1). A sequence without a token that counts has 0.
    """
    product = (chosen / tokens) * (probability / tokens)
    return product.sum(dim=-1, keepdim=True) * (chosen.shape[-1] / top_k)
