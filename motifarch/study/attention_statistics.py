"""What the papers on differential attention argue from: where attention goes, how much of it
cancels, what stands out.

All maps are recomputed in float32 by the reference formula, a head and a document at a time, from
the queries and keys that the layers really use. With A1 the softmax of a signal head, A2 that of
its noise head and lambda as the layer has it, the layer weighs values by ``A = A1 - lambda A2``
(arXiv 2410.05258, equation 1). A's rows are no distributions: they sum to ``1 - lambda`` and have
negative entries. Shares and entropies of A are therefore those of ``|A| / sum |A|`` over the row,
which for softmax attention (A2 absent) is the map itself, so that variants compare; those of A1 and
A2 alone stand beside them. The definitions are ours. What they bear on: attention noise, and
activation outliers by largest against typical magnitude, in arXiv 2410.05258; negative attention in
"Understanding Differential Transformer Unchains Pretrained Self-Attentions" (arXiv 2505.16333); the
first token in "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
"""

import math
import operator
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from motif_kernels.reference import attention_map, attention_mask
from motif_kernels.types import AttentionInputs, Noise, Sequences
from motifarch.data import Block, collate
from motifarch.layers.base_attention import BaseAttention, Batch
from motifarch.models.motif import MotifForCausalLM
from motifarch.train.step import to_device


@torch.no_grad()
def attention_statistics(model: MotifForCausalLM, rows: Sequence[Block]) -> dict[str, Any]:
    """Statistics of attention and activations over packed rows, whose documents do not see each
    other.

    A document's first token, which sees nothing but itself, counts as a key and not as a query.

    Args:
        model: in evaluation mode and float32.
        rows: at least one; each goes through the model alone.

    Returns:
        ``queries``, how many were looked at; ``uniform_first_token_share`` and ``uniform_entropy``,
        what attention that is spread evenly over what it may see would have; and ``layers``, for
        each layer, means over heads and queries (null where softmax attention has no such thing):

        - first_token_share, entropy (nats): of ``|A| / sum |A|``; signal_... and noise_...: of A1
          and A2;
        - negative_share: what part of ``sum |A|`` is negative;
        - cancelled_share: ``1 - sum |A| / (1 + |lambda|)``, what part of both maps' weight takes
          itself out;
        - lambda: the mean over tokens and heads;
        - largest_logit: of all heads, scaled, before the softmax;
        - outlier_ratio, kurtosis: ``max |x| / rms(x)`` and the fourth standardised moment
          (3 for a normal distribution) over all elements of the residual stream behind the layer;
          attention_...: of the attention block's output.
    """
    tallies = [_Tally() for _ in model.model.layers]
    with _watched(model, tallies):
        for row in rows:
            batch = to_device(collate([row]), model.device)
            del batch["shift_labels"]
            model.model(**batch, use_cache=False)
    result = tallies[0].uniform()
    return {**result, "layers": [tally.result() for tally in tallies]}


class _Moments:
    """The largest magnitude and the first four moments of everything that was added."""

    def __init__(self) -> None:
        self.count, self.largest, self.powers = 0, 0.0, [0.0] * 4

    def add(self, x: Tensor) -> None:
        x = x.double()
        self.count += x.numel()
        self.largest = max(self.largest, float(x.abs().max()))
        self.powers = [p + float(x.pow(i).sum()) for i, p in enumerate(self.powers, 1)]

    def result(self, kind: str = "") -> dict[str, float]:
        """``max |x| / rms(x)``, and the kurtosis."""
        first, second, third, fourth = (p / self.count for p in self.powers)
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return {
            f"{kind}outlier_ratio": self.largest / math.sqrt(second),
            f"{kind}kurtosis": central / variance**2,
        }


class _Tally:
    """Sums over what one layer did."""

    def __init__(self) -> None:
        self.counts, self.sums = Counter[str](), defaultdict[str, float](float)
        self.largest_logit = -math.inf
        self.residual, self.output = _Moments(), _Moments()

    def add(self, name: str, values: Tensor) -> None:
        """Adds to a mean over heads and queries."""
        self.counts[name] += values.numel()
        self.sums[name] += float(values.sum(dtype=torch.float64))

    def mean(self, name: str) -> float | None:
        """None where nothing was added, as of softmax attention or without queries."""
        return self.sums[name] / self.counts[name] if self.counts[name] else None

    def attention(self, layer: BaseAttention, inputs: AttentionInputs, batch: Batch) -> None:
        """Adds the maps of one packed row: what a layer calls as its ``attention_hook``. Whose
        attention is a function of its own, or no softmax, has none.

        Args:
            layer: whose.
            inputs: queries (1, T, H, D), keys (1, T, Hk, D) and lambda, () or (1, T, Hs); None for
                softmax attention.
            batch: the documents' bounds, from 0 to T.
        """
        if not isinstance(batch, Sequences):
            return
        assert batch.cu_seqlens_q is not None
        if inputs.lam is not None:
            self.add("lambda", inputs.lam)
        for start, end in pairwise(batch.cu_seqlens_q.tolist()):
            if end - start < 2:
                continue
            document = inputs.map(operator.itemgetter((slice(None), slice(start, end))))
            n, device = end - start, inputs.q1.device
            left, right = layer.window_size
            mask = attention_mask(n, n, causal=layer.causal, window_size=(left, right), device=device)
            seen = mask[1:].sum(-1)
            self.add("uniform_first_token_share", mask[1:, 0] / seen)
            self.add("uniform_entropy", seen.log())
            if document.noise is None:
                for head in range(document.q1.shape[2]):
                    self._add_map("", self._map(layer, document.q1, document.k1, head, mask))
            else:
                self._differential(layer, document, document.noise, mask)

    def _differential(self, layer: BaseAttention, document: AttentionInputs, noise: Noise, mask: Tensor) -> None:
        group = document.q1.shape[2] // noise.q.shape[2]
        lam = noise.lam if noise.lam.ndim == 0 else noise.lam[0, 1:]
        for noise_head in range(noise.q.shape[2]):
            noise_map = self._map(layer, noise.q, noise.k, noise_head, mask)
            self._add_map("noise_", noise_map)
            for head in range(noise_head * group, (noise_head + 1) * group):
                signal = self._map(layer, document.q1, document.k1, head, mask)
                self._add_map("signal_", signal)
                own = lam.float() if lam.ndim == 0 else lam[:, head, None].float()
                difference = signal - own * noise_map
                mass = difference.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                self._add_map("", difference.abs() / mass)
                self.add("negative_share", (-difference).clamp_min(0).sum(-1, keepdim=True) / mass)
                self.add("cancelled_share", 1 - mass / (1 + own.abs()))

    def _map(self, layer: BaseAttention, q: Tensor, k: Tensor, head: int, mask: Tensor) -> Tensor:
        """One head's map without the first query, (n - 1, n) float32."""
        key_head = head * k.shape[2] // q.shape[2]
        scale = layer.head_dim**-0.5 if layer.softmax_scale is None else layer.softmax_scale
        weights, largest = attention_map(
            q[:, :, head : head + 1].float(),
            k[:, :, key_head : key_head + 1].float(),
            mask=mask,
            softmax_scale=scale,
        )
        self.largest_logit = max(self.largest_logit, float(largest))
        return weights[0, 0, 1:]

    def _add_map(self, kind: str, weights: Tensor) -> None:
        self.add(f"{kind}first_token_share", weights[:, 0])
        self.add(f"{kind}entropy", torch.special.entr(weights).sum(-1))

    def uniform(self) -> dict[str, float | None]:
        """What evenly spread attention would have, and the number of queries."""
        names = ("uniform_first_token_share", "uniform_entropy")
        return {"queries": self.counts[names[0]], **{name: self.mean(name) for name in names}}

    def result(self) -> dict[str, float | None]:
        """A layer's figures, as :func:`attention_statistics` describes them."""
        shares = [f"{kind}{name}" for kind in ("", "signal_", "noise_") for name in ("first_token_share", "entropy")]
        names = [*shares, "negative_share", "cancelled_share", "lambda"]
        return {
            **{name: self.mean(name) for name in names},
            "largest_logit": self.largest_logit if math.isfinite(self.largest_logit) else None,
            **self.residual.result(),
            **self.output.result("attention_"),
        }


@contextmanager
def _watched(model: MotifForCausalLM, tallies: Sequence[_Tally]) -> Iterator[None]:
    """Within, each layer's forward pass is added to its tally."""
    with ExitStack() as undo:
        for layer, tally in zip(model.model.layers, tallies, strict=True):
            attention: BaseAttention = layer.self_attn
            attention.attention_hook = partial(tally.attention, attention)
            undo.callback(setattr, attention, "attention_hook", None)
            for module, moments in ((layer, tally.residual), (attention, tally.output)):
                hook = module.register_forward_hook(lambda *call, to=moments: to.add(call[-1]))
                undo.callback(hook.remove)
        yield


def gradient_norm_spikes(rows: Sequence[Mapping[str, Any]], *, window: int = 64, deviations: float = 6.0) -> int:
    """Steps whose gradient norm stands out from those before it.

    A step counts where its norm is more than ``deviations`` robust standard deviations (1.4826
    times the median absolute deviation) above the median of the ``window`` finite norms before it,
    or is not finite. Median and deviation, unlike a mean, are hardly moved by spikes before. The
    first ``window`` norms are only looked back at.

    Args:
        rows: a run's metrics (:func:`motifarch.train.metrics.read_metrics`), with a null for what
            was not finite.
        window: norms to compare with.
        deviations: how far above them a spike is.
    """
    spikes, before = 0, list[float]()
    for row in rows:
        norm = row["grad_norm"]
        if norm is None:
            spikes += 1
            continue
        if len(before) == window:
            median = statistics.median(before)
            deviation = 1.4826 * statistics.median(abs(b - median) for b in before)
            spikes += norm > median + deviations * deviation
            del before[0]
        before.append(norm)
    return spikes
