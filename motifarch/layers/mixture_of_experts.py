"""A mixture of experts in the place of a feed-forward block."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from motifarch.layers.experts import Experts
from motifarch.layers.mlp import PolyNormMLP, SwiGLUMLP
from motifarch.layers.recorded import RecordedOperator, recorded
from motifarch.layers.router import Router, Routing, balance_loss, balance_sums, entropy_of_shares
from motifarch.layers.sequences import Sequences
from motifarch.layers.sorted_tokens import ExpertRows, SortedTokens
from motifarch.layers.token_exchange import TokenExchange


class MoEOutput(NamedTuple):
    """What a mixture of experts gives."""

    hidden_states: Tensor  # of the input's shape and dtype
    losses: Tensor | None  # (B, S, 2): balance and magnitude loss of each token's sequence; None in eval mode


class MoEStatistics(NamedTuple):
    """Means over the tokens of training since the statistics were reset."""

    entropy: Tensor  # () of a token's shares of scores, in nats
    routed_rms: Tensor  # () of the routed experts' weighted sum
    shared_rms: Tensor  # () of the shared expert's output, 0 without one
    expert_outputs: Tensor | None  # (num_experts, E), each expert's mean output, if recorded
    peak: Tensor | None  # () of an output's largest magnitude over its RMS, if recorded


def _add_counts(
    tokens_per_expert: Tensor,
    statistic_sums: Tensor,
    counts: Tensor,
    scores: Tensor,
    routed: Tensor,
    shared: Tensor | None,
    real: Tensor | None,
) -> None:
    """Adds to what a training loop reads."""
    tokens_per_expert += counts
    entropy = entropy_of_shares(scores)
    tokens = entropy.new_tensor(len(entropy)) if real is None else real.sum()
    if real is not None:
        entropy = entropy.masked_fill(~real, 0)
    squares = (
        torch.zeros_like(entropy[:1]) if t is None else t.to(routed.dtype).square().mean(dim=-1)
        for t in (routed, shared)
    )
    sums = [t.sum() for t in (entropy, *squares)]
    statistic_sums += torch.stack([tokens.to(entropy.dtype), *sums])


_count = RecordedOperator("motifarch::count_routing", _add_counts, changes=("tokens_per_expert", "statistic_sums"))


class MixtureOfExperts(nn.Module):
    """Routed experts of which each token takes ``top_k``, and a shared one for all tokens.

    ``sum_k w_k E_k(x) + shared(x)``, added in float32 (float64 for float64 inputs) and rounded
    once. No token is dropped. Sources: DeepSeek-V3, arXiv 2412.19437; the load is balanced by a
    bias on the selection alone (arXiv 2408.15664), which a training loop moves.

    Attributes:
        expert_bias: (num_experts,) float32 buffer, added to the scores that experts are selected
            by. It enters no weight and has no gradient.
        tokens_per_expert: (num_experts,) float32 buffer that is not saved. Each forward pass in
            training mode adds how many tokens went to each expert, its recomputation by
            motifarch.parallel none. Who reads it sets it to 0.
        router_noise: standard deviation of the noise on the router's logits in training mode, 0
            when made; set it from outside.
        expert_group: ranks that share the experts, each with consecutive ones, and send each other
            tokens; None when made; set it from outside. Then ``experts`` has this rank's alone,
            and all ranks call the layer together.
        exchange: how these send tokens; by all-to-all (:class:`TokenExchange`) when made.
        context_group: ranks that each hold a part of every sequence (context parallelism), whose
            losses are those of the whole; None when made, set it from outside.
        sequence_length: tokens of a training sequence, where a row has several one after the other
            and each has losses of its own; None when made, for rows that are one; set it from
            outside.
        record_expert_outputs: in training mode, also sum up each expert's outputs, and the peaks of
            the block's; False when made.

    Buffers stay float32 where the module is cast.

    Args:
        hidden_size: E.
        num_experts: how many are routed to.
        top_k: how many of them a token goes to.
        intermediate_size: width of an expert's gate and up branches.
        num_shared_experts: 0 for no shared expert; more than one are one block, so many times as
            wide.
        shared_intermediate_size: width of the shared block's branches, if not
            ``num_shared_experts * intermediate_size``.
        activation: "poly_norm" or "silu" (SwiGLU), of all experts.
        route_norm: divide a token's weights by their sum.
        route_scale: multiplies the weights, after that.
        score_func: "sigmoid" or "softmax" of the router's logits.
        eps: PolyNorm's epsilon; so are the next three its options (see
            :class:`~motifarch.layers.PolyNorm`), and without effect on SwiGLU.
        sigmoid_weight: its weights are ``sigmoid(weight)``.
        output_scale: multiplies it.
        bias_clamp: a routed expert's bias is used within these bounds; the shared one's as it is.
        hidden_clamp: clamp gate, up and activated product to ``[-hidden_clamp, hidden_clamp]``;
            gate and up alone in the shared PolyNorm expert, nothing in a shared SwiGLU.
        balance_loss_coeff: weight of each sequence's balance loss, in training mode.
        magnitude_loss_coeff: weight of ``mean(relu(|y| - magnitude_threshold)^2)`` of the output y.
        magnitude_threshold: what an output's magnitude may be for nothing.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: top_k is not 1 to num_experts; an activation or score_func that is not known.
    """

    expert_bias: Tensor
    tokens_per_expert: Tensor
    statistic_sums: Tensor
    expert_output_sums: Tensor | None
    output_peak_sums: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        top_k: int,
        intermediate_size: int,
        num_shared_experts: int = 1,
        shared_intermediate_size: int | None = None,
        activation: str = "poly_norm",
        route_norm: bool = True,
        route_scale: float = 1.0,
        score_func: str = "sigmoid",
        eps: float = 1e-6,
        sigmoid_weight: bool = False,
        output_scale: float = 1.0,
        bias_clamp: float | None = None,
        hidden_clamp: float | None = None,
        balance_loss_coeff: float = 0.0,
        magnitude_loss_coeff: float = 0.0,
        magnitude_threshold: float = 128.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        poly_norm: dict[str, Any] = {"eps": eps, "sigmoid_weight": sigmoid_weight, "output_scale": output_scale}
        self.num_experts, self.top_k = num_experts, top_k
        self.balance_loss_coeff, self.magnitude_loss_coeff = balance_loss_coeff, magnitude_loss_coeff
        self.magnitude_threshold = magnitude_threshold
        self.router_noise, self.record_expert_outputs = 0.0, False
        self.expert_group: ProcessGroup | None = None
        self.exchange: Callable[[Tensor, Tensor, int, ProcessGroup], ExpertRows] = TokenExchange
        self.context_group: ProcessGroup | None = None
        self.sequence_length: int | None = None
        self.router = Router(
            hidden_size,
            num_experts=num_experts,
            top_k=top_k,
            route_norm=route_norm,
            route_scale=route_scale,
            score_func=score_func,
            **made,
        )
        self.experts = Experts(
            hidden_size,
            num_experts=num_experts,
            intermediate_size=intermediate_size,
            activation=activation,
            **poly_norm,
            bias_clamp=bias_clamp,
            hidden_clamp=hidden_clamp,
            **made,
        )
        width = num_shared_experts * intermediate_size if shared_intermediate_size is None else shared_intermediate_size
        self.shared_experts: PolyNormMLP | SwiGLUMLP | None = None
        if num_shared_experts and activation == "poly_norm":
            self.shared_experts = PolyNormMLP(
                hidden_size, intermediate_size=width, **poly_norm, hidden_clamp=hidden_clamp, **made
            )
        elif num_shared_experts:
            self.shared_experts = SwiGLUMLP(hidden_size, intermediate_size=width, **made)
        numbers: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.register_buffer("expert_bias", torch.zeros(num_experts, **numbers))
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, **numbers), persistent=False)
        # Tokens, and sums over them of entropy and of the routed and shared outputs' mean squares.
        self.register_buffer("statistic_sums", torch.zeros(4, **numbers), persistent=False)
        # (num_experts, E + 1): sums of outputs and, last, how many. Made when first recorded.
        self.register_buffer("expert_output_sums", None, persistent=False)
        # Sum of tokens' peaks and, last, how many.
        self.register_buffer("output_peak_sums", None, persistent=False)

    def reset_buffers(self) -> None:
        """No bias, no counts, no statistics: needed after ``to_empty``."""
        self.expert_bias.zero_()
        self.tokens_per_expert.zero_()
        self.reset_statistics()

    def forward(self, hidden_states: Tensor, *, padding: Tensor | None = None) -> MoEOutput:
        """hidden_states (..., S, E) -> the same; all dimensions before S are rows B.

        Args:
            hidden_states: the tokens.
            padding: (..., S) bool, true for a real token. Others get 0 and enter neither counts nor
                losses.

        Raises:
            ValueError: padding of another shape or dtype.
        """
        if padding is not None and (padding.shape != hidden_states.shape[:-1] or padding.dtype != torch.bool):
            raise ValueError(
                f"padding is {padding.dtype} of shape {tuple(padding.shape)}; it must be bool, true for a real token, "
                f"of shape {tuple(hidden_states.shape[:-1])}, that of hidden_states but the last"
            )
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        real = None if padding is None else padding.flatten()
        if real is not None:
            tokens = tokens.masked_fill(~real[:, None], 0)  # of which the shared expert makes 0
        routing = self.router(tokens, bias=self.expert_bias, noise=self.router_noise if self.training else 0.0)
        selected = routing.selected
        if real is not None:
            selected = selected.masked_fill(~real[:, None], self.num_experts)
        rows: ExpertRows
        if self.expert_group is None:
            rows = SortedTokens(selected, routing.weights, self.num_experts)
        else:
            rows = self.exchange(selected, routing.weights, self.num_experts, self.expert_group)
        dispatched = rows.dispatch(tokens)
        shared = None if self.shared_experts is None else self.shared_experts(tokens)
        outputs = self.experts(rows.receive(dispatched), rows.offsets)
        routed = rows.combine(outputs)
        out = routed if shared is None else routed + shared
        losses = None
        if self.training:
            length = hidden_states.shape[-2] if hidden_states.ndim > 1 else 1
            losses = self._losses(routing, out, real, length)
            # Once, however often the layer is computed again.
            _count(self.tokens_per_expert, self.statistic_sums, rows.counts, routing.scores, routed, shared, real)
            if self.record_expert_outputs:
                recorded(lambda: self._record(rows, outputs, out))
        return MoEOutput(out.to(hidden_states.dtype).view(hidden_states.shape), losses)

    def _losses(self, routing: Routing, out: Tensor, real: Tensor | None, length: int) -> Tensor:
        """(B, S, 2), times their coefficients: of whole sequences, also where ranks hold parts."""
        out = out.unflatten(0, (-1, length))
        losses = out.new_zeros(*out.shape[:2], 2)
        if not (self.balance_loss_coeff or self.magnitude_loss_coeff):
            return losses
        counted = torch.ones_like(losses[..., :1]) if real is None else real.view(-1, length, 1).to(out.dtype)
        scores, selected = (t.unflatten(0, (-1, length)) for t in (routing.scores, routing.selected))
        sequences = Sequences(length, self.sequence_length, self.context_group)
        parts = zip(*(sequences.each(t) for t in (counted, out, scores, selected)), strict=True)
        tokens, *sums = sequences.sums([self._loss_sums(*of_sequence) for of_sequence in parts])
        tokens = tokens.clamp(min=1)
        balance = magnitude = torch.zeros_like(tokens)
        if self.magnitude_loss_coeff:
            magnitude = self.magnitude_loss_coeff * sums.pop(0) / tokens
        if self.balance_loss_coeff:
            chosen, probability = sums
            balance = self.balance_loss_coeff * balance_loss(chosen, probability, tokens, self.top_k)
        return sequences.spread(torch.cat((balance, magnitude), dim=-1))

    def _loss_sums(self, counted: Tensor, out: Tensor, scores: Tensor, selected: Tensor) -> list[Tensor]:
        """What losses are made of, each (B, n): sums over a sequence's tokens (B, S, ...)."""
        sums = [counted.sum(dim=1)]
        if self.magnitude_loss_coeff:
            # A padded token's output is 0.
            excess = F.softshrink(out, self.magnitude_threshold)
            sums += [excess.square().mean(dim=-1).sum(dim=1, keepdim=True)]
        if self.balance_loss_coeff:
            sums += balance_sums(scores, selected, counted)
        return sums

    def _record(self, rows: ExpertRows, outputs: Tensor, out: Tensor) -> None:
        """Adds to what is read at times."""
        if self.expert_output_sums is None or self.output_peak_sums is None:
            self.expert_output_sums = self.statistic_sums.new_zeros(self.num_experts, out.shape[-1] + 1)
            self.output_peak_sums = self.statistic_sums.new_zeros(2)
        values = torch.cat((outputs.float(), outputs.new_ones(len(outputs), 1).float()), dim=1)
        expert = rows.expert_of_row
        kept = expert < self.num_experts
        self.expert_output_sums.index_add_(0, expert.clamp(max=self.num_experts - 1), values * kept[:, None])
        rms = out.square().mean(dim=-1).sqrt()
        counted = rms > 0  # the output of padding is 0
        peaks = out.abs().amax(dim=-1) / rms.where(counted, 1)
        self.output_peak_sums += torch.stack((peaks.sum(), counted.sum()))

    def statistics(self) -> MoEStatistics:
        """Means over all tokens since :meth:`reset_statistics`, on the device.

        ``statistic_sums`` and, if recorded, ``expert_output_sums`` and ``output_peak_sums`` are
        sums: those of several ranks may be added up first.
        """
        tokens, entropy, routed, shared = self.statistic_sums
        tokens = tokens.clamp(min=1)
        outputs = peak = None
        if self.expert_output_sums is not None and self.output_peak_sums is not None:
            outputs = self.expert_output_sums[:, :-1] / self.expert_output_sums[:, -1:].clamp(min=1)
            peak = self.output_peak_sums[0] / self.output_peak_sums[1].clamp(min=1)
        rms = (routed / tokens).sqrt(), (shared / tokens).sqrt()
        return MoEStatistics(entropy / tokens, *rms, outputs, peak)

    def reset_statistics(self) -> None:
        """Forgets them; ``tokens_per_expert`` is not among them."""
        self.statistic_sums.zero_()
        self.expert_output_sums = self.output_peak_sums = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A bias rounded to bfloat16 would not move by a step of 1e-3, and counts end at 256.
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"balance_loss_coeff={self.balance_loss_coeff}, magnitude_loss_coeff={self.magnitude_loss_coeff}, "
            f"magnitude_threshold={self.magnitude_threshold}"
        )
