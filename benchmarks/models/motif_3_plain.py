"""Motif-3 in plain PyTorch: what kernels are measured against in a whole training step.

The same modules with the same parameters, each computing what its description says with torch's
own operators: attention by maps, PolyNorm and RMSNorm by their formulas, hyper-connections by
broadcast sums and autograd through all Sinkhorn iterations, experts one after the other.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motifarch.layers import HyperConnections, MixtureOfExperts, PolyNorm, RMSNorm
from motifarch.layers.experts import Experts
from motifarch.layers.mixture_of_experts import MoEOutput
from motifarch.models.motif import MotifForCausalLM


def make_plain(model: MotifForCausalLM) -> None:
    """Has a model of float32 compute so, in place."""
    model.set_attn_implementation("eager")
    for module in model.modules():
        for kind, forward in _FORWARD.items():
            if isinstance(module, kind):
                module.forward = MethodType(forward, module)  # type: ignore[assignment]


def _rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _poly_norm(self: PolyNorm, x: Tensor, up: Tensor) -> Tensor:
    if self.hidden_clamp is not None:
        x, up = (t.clamp(-self.hidden_clamp, self.hidden_clamp) for t in (x, up))
    return _poly(x, self.weight, self.bias, self.eps) * up * self.output_scale


def _poly(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    w = weight.sigmoid()

    def norm(z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(dim=-1, keepdim=True) + eps)

    return w[0] * norm(x * x * x) + w[1] * norm(x * x) + w[2] * norm(x) + bias


def _hyper_connections(self: HyperConnections, streams: Tensor, sublayer: Any) -> Any:
    normed = self.rms_norm(streams.flatten(-2))

    def logits(alpha: Tensor, projection: nn.Module, bias: Tensor, bound: float) -> Tensor:
        return (alpha * projection(normed).unflatten(-1, bias.shape) + bias).clamp(-bound, bound)

    pre = logits(self.alpha_pre, self.proj_pre, self.bias_pre, 10.0).sigmoid()
    post = (1 + self.post_alpha) * logits(self.alpha_post, self.proj_post, self.bias_post, 10.0).sigmoid()
    mix = logits(self.alpha_res, self.proj_res, self.bias_res, 20.0).exp()
    for _ in range(self.sinkhorn_iters):
        mix = mix / mix.sum(dim=-1, keepdim=True).clamp(min=1e-8)
        mix = mix / mix.sum(dim=-2, keepdim=True).clamp(min=1e-8)
    out = sublayer((pre.unsqueeze(-2) @ streams).squeeze(-2))
    out, *extra = out if isinstance(out, tuple) else (out,)
    result = mix @ streams + post.unsqueeze(-1) * out.unsqueeze(-2)
    return (result, *extra) if extra else result


def _mixture(self: MixtureOfExperts, hidden_states: Tensor, *, padding: None = None) -> MoEOutput:
    assert padding is None
    tokens = hidden_states.flatten(0, -2)
    scores = F.linear(tokens, self.router.gate.weight).sigmoid()
    selected = (scores.detach() + self.expert_bias).topk(self.top_k, dim=-1).indices
    weights = scores.gather(1, selected)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.router.route_scale
    routed = self.experts(tokens, selected, weights)
    assert self.shared_experts is not None
    shared = self.shared_experts(tokens)
    out = routed + shared
    chosen, share = torch.zeros_like(scores).scatter_(1, selected, 1.0), scores / scores.sum(dim=-1, keepdim=True)
    with torch.no_grad():
        self.tokens_per_expert += chosen.sum(dim=0)
        sums = [-torch.special.xlogy(share, share).sum(), *(t.square().mean(dim=-1).sum() for t in (routed, shared))]
        self.statistic_sums += torch.stack([sums[0].new_tensor(len(tokens)), *sums])

    def of_sequences(t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, self.sequence_length or hidden_states.shape[-2])).mean(dim=1, keepdim=True)

    balance = (of_sequences(chosen) * of_sequences(share)).sum(dim=-1) * (self.num_experts / self.top_k)
    magnitude = of_sequences((out.abs() - self.magnitude_threshold).relu().square()).mean(dim=-1)
    losses = torch.stack((self.balance_loss_coeff * balance, self.magnitude_loss_coeff * magnitude), dim=-1)
    spread = losses.expand(-1, len(tokens) // len(losses), -1)
    return MoEOutput(out.view_as(hidden_states), spread.reshape(*hidden_states.shape[:-1], 2).clone())


def _experts(self: Experts, tokens: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
    routed = torch.zeros_like(tokens)
    assert self.act_fn is not None
    bound, bias_bound = self.hidden_clamp, self.act_fn.bias_clamp
    assert bound is not None
    assert bias_bound is not None
    # Taken apart at once: the gradient of each by itself would be a tensor of all of them.
    owned = self.gate_up_proj, self.down_proj, self.act_fn.weight, self.act_fn.bias
    each = zip(*(p.unbind(0) for p in owned), strict=True)
    for e, (gate_up, down, weight, bias) in enumerate(each):
        token, slot = torch.where(selected == e)
        if not len(token):
            continue
        gate, up = F.linear(tokens[token], gate_up).clamp(-bound, bound).chunk(2, dim=-1)
        hidden = _poly(gate, weight, bias.clamp(-bias_bound, bias_bound), self.act_fn.eps) * up
        out = F.linear(hidden.clamp(-bound, bound) * self.act_fn.output_scale, down)
        routed.index_add_(0, token, out * weights[token, slot, None])
    return routed


_FORWARD: dict[type[nn.Module], Callable[..., Any]] = {
    RMSNorm: _rms_norm,
    PolyNorm: _poly_norm,
    HyperConnections: _hyper_connections,
    MixtureOfExperts: _mixture,
    Experts: _experts,
}
