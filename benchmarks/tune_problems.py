"""What `benchmarks.tune` launches: for each kind of problem its inputs, its size in the launch
tables, its kernels.

All is bfloat16. A problem's ``launches(kernel, device)`` draws the inputs, runs what comes before
the kernel, and returns a function that launches the kernel alone, with whatever entry is in force,
and hands back results by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.kernels import Draw, draw_from
from motif_kernels import diff_attn_func, diff_attn_with_kvcache, tuning

DTYPE = torch.bfloat16
NORM_EPS = 1e-5

Launch = Callable[[], dict[str, Tensor]]


class Problem(Protocol):
    """One set of inputs."""

    def size(self, kernel: str) -> int:
        """What the launch tables' ``up_to`` bounds, for a kernel of this problem."""

    def describe(self) -> str:
        """In words."""

    def launches(self, kernel: str, device: torch.device) -> Launch:
        """Launches the kernel, with the entry in force, on the same inputs each time."""


def _named(results: Any) -> dict[str, Tensor]:
    """The tensors of a named tuple that are not empty."""
    return {name: tensor for name, tensor in results._asdict().items() if tensor.numel()}


@dataclass(frozen=True)
class Rows:
    """PolyNorm with ``up`` on (rows, columns)."""

    rows: int
    columns: int

    def size(self, kernel: str) -> int:
        """A row's bytes."""
        return self.columns * DTYPE.itemsize

    def describe(self) -> str:
        """In words."""
        return f"{self.rows:,} x {self.columns:,}"

    def launches(self, kernel: str, device: torch.device) -> Launch:
        """Of poly_norm_forward, poly_norm_backward or poly_norm_sums."""
        from motif_kernels.impl.triton import poly_norm

        draw = draw_from(0, DTYPE, device)
        x, up, grad = (draw(self.rows, self.columns) for _ in range(3))
        weight = torch.full((3,), 1 / 3, device=device)
        bias = torch.zeros(1, device=device)
        clamp: dict[str, Any] = {"hidden_clamp": None}

        def forward() -> dict[str, Tensor]:
            out = poly_norm.forward(x, up, weight, bias, inverse_rms=None, eps=NORM_EPS, out_dtype=DTYPE, **clamp)
            return {"output": out}

        def backward() -> dict[str, Tensor]:
            dx, dup, sums = poly_norm.backward(
                grad, x, up, weight, bias, inverse_rms=None, mean_products=None, eps=NORM_EPS, **clamp
            )
            assert dup is not None
            assert sums is not None
            return {"dx": dx, "dup": dup, "sums": sums}

        def both_sums() -> dict[str, Tensor]:
            power, products = poly_norm.power_sums(x, **clamp), poly_norm.product_sums(grad, x, up, **clamp)
            return {"power sums": power, "product sums": products}

        launch: Launch = {
            "poly_norm_forward": forward,
            "poly_norm_backward": backward,
            "poly_norm_sums": both_sums,
        }[kernel]
        return launch


@dataclass(frozen=True)
class Epilogue:
    """diff_combine with the sub-norm: heads of ``width``, ``ratio`` signal heads for each noise
    head.
    """

    tokens: int
    noise_heads: int
    ratio: int
    width: int

    def size(self, kernel: str) -> int:
        """A head's bytes."""
        return self.width * DTYPE.itemsize

    def describe(self) -> str:
        """In words."""
        return f"{self.tokens:,} x {self.ratio * self.noise_heads}:{self.noise_heads} heads of {self.width}"

    def launches(self, kernel: str, device: torch.device) -> Launch:
        """Of diff_combine_forward or diff_combine_backward."""
        from motif_kernels.impl.triton import combine

        draw = draw_from(0, DTYPE, device)
        signal, grad = (draw(self.tokens, self.ratio * self.noise_heads, self.width) for _ in range(2))
        noise = draw(self.tokens, self.noise_heads, self.width)
        lam = torch.full((), 0.5, device=device)
        weight = 1 + 0.1 * draw(self.width, dtype=torch.float32)
        options: dict[str, Any] = {"norm_eps": NORM_EPS, "out_scale": 0.8}

        def forward() -> dict[str, Tensor]:
            return {"output": combine.forward(signal, noise, lam, weight, None, out_dtype=DTYPE, **options)}

        def backward() -> dict[str, Tensor]:
            names = ("signal", "noise", "lambda", "norm_weight")
            found = combine.backward(grad, signal, noise, lam, weight, None, **options)
            return {name: t for name, t in zip(names, found, strict=False) if t is not None}

        return forward if kernel == "diff_combine_forward" else backward


@dataclass(frozen=True)
class Attention:
    """Differential attention over sequences of ``tokens``; each noise head has a key head and a
    value head.
    """

    width: int
    value_width: int
    ratio: int
    noise_heads: int
    tokens: int
    batch: int = 1
    causal: bool = True
    window: int | None = None
    packed: bool = False
    """Documents of ``tokens`` in one row, instead of a batch."""
    epilogue: str = "norm"
    """Or "gate", or "none"."""
    deterministic: bool = True

    def size(self, kernel: str) -> int:
        """A value head's bytes for attention_prepare, else attention's size in the tables."""
        if kernel == "attention_prepare":
            return DTYPE.itemsize * self.value_width
        return tuning.attention_size(self.width, self.value_width, DTYPE.itemsize)

    def describe(self) -> str:
        """In words."""
        what = [
            f"({self.width}, {self.value_width})",
            f"{self.ratio * self.noise_heads}:{self.noise_heads} heads",
            f"{self.batch} x {self.tokens:,}",
            *([] if self.causal else ["not causal"]),
            *([f"window {self.window}"] if self.window else []),
            *(["packed"] if self.packed else []),
            *([] if self.epilogue == "norm" else [f"epilogue {self.epilogue}"]),
            *([] if self.deterministic else ["not deterministic"]),
        ]
        return ", ".join(what)

    def _inputs(self, draw: Draw, device: torch.device) -> dict[str, Any]:
        leading = (self.batch * self.tokens,) if self.packed else (self.batch, self.tokens)
        signal_heads, noise_heads = self.ratio * self.noise_heads, self.noise_heads
        return {
            "q1": draw(*leading, signal_heads, self.width),
            "k1": draw(*leading, noise_heads, self.width),
            "q2": draw(*leading, noise_heads, self.width),
            "k2": draw(*leading, noise_heads, self.width),
            "v": draw(*leading, noise_heads, self.value_width),
            "lam": torch.full((), 0.5, device=device),
            "norm_weight": torch.ones(self.value_width, device=device) if self.epilogue == "norm" else None,
            "gate": draw(*leading, signal_heads, self.value_width) if self.epilogue == "gate" else None,
        }

    def launches(self, kernel: str, device: torch.device) -> Launch:
        """Of one of the attention kernels."""
        from motif_kernels.impl.triton import diff_attention as attention
        from motif_kernels.ops import diff_attention as operator

        draw = draw_from(0, DTYPE, device)
        bounds = torch.arange(self.batch + 1, dtype=torch.int32, device=device) * self.tokens if self.packed else None
        tensors = operator.Tensors(**self._inputs(draw, device), cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        options = operator.Options(
            max_seqlen_q=self.tokens,
            max_seqlen_k=self.tokens,
            softmax_scale=self.width**-0.5,
            left=-1 if self.window is None else self.window - 1,
            right=0 if self.causal else -1,
            softcap=0.0,
            norm_eps=NORM_EPS,
            out_scale=0.8,
            deterministic=self.deterministic,
            save=True,
            max_logits=False,
        )

        def forward() -> dict[str, Tensor]:
            return _named(attention.forward(tensors, options, operator.empty_results(tensors, options)))

        if kernel == "attention_forward":
            return forward
        saved = forward()
        grad = draw(*tensors.q1.shape[:-1], self.value_width)
        lse = saved["lse_signal"], saved["lse_noise"]
        inverse_rms = saved.get("inverse_rms", torch.empty(0, device=device))

        def prepare() -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], operator.Gradients]:
            d_a = torch.empty_like(saved["difference"])
            d_o2 = torch.empty_like(saved["noise"]) if self.ratio > 1 and self.deterministic else None
            deltas = torch.empty_like(lse[0]), torch.empty_like(lse[1])
            empty = operator.empty_gradients(tensors)
            difference, noise = saved["difference"], saved["noise"]
            found = attention.backward_prepare(
                grad, tensors, options, difference, noise, lse[0], inverse_rms, d_a, d_o2, deltas, empty
            )
            return d_a, d_o2, deltas, found

        d_a, d_o2, deltas, _ = prepare()

        def prepared() -> dict[str, Tensor]:
            d_a, d_o2, deltas, found = prepare()
            results = {"dA": d_a, "dO2": d_o2, "D1": deltas[0], "D2": deltas[1], "lambda": found.lam}
            results |= {"norm_weight": found.norm_weight, "gate": found.gate}
            return {name: t for name, t in results.items() if t is not None and t.numel()}

        def keys() -> dict[str, Tensor]:
            queries: dict[str, Tensor] = {}
            if not self.deterministic:
                pairs = (("q1", tensors.q1), ("q2", tensors.q2))
                queries = {name: torch.zeros(q.shape, device=device) for name, q in pairs}
            empty = operator.empty_gradients(tensors)
            found = attention.backward_keys(
                tensors, options, d_a, lse, deltas, empty, queries.get("q1"), queries.get("q2")
            )
            return {"k1": found.k1, "k2": found.k2, "v": found.v, **queries}

        def both_queries() -> dict[str, Tensor]:
            found = operator.empty_gradients(tensors)
            attention.backward_queries(tensors, options, d_a, lse, deltas, d_o2, found)
            return {"q1": found.q1, "q2": found.q2}

        launch: Launch = {
            "attention_prepare": prepared,
            "attention_backward_keys": keys,
            "attention_backward_queries": both_queries,
        }[kernel]
        return launch

    def backend(self, device: torch.device) -> Callable[[str], dict[str, Tensor]]:
        """Forward and backward of diff_attn_func by the backend that is named."""
        draw = draw_from(0, DTYPE, device)
        inputs = self._inputs(draw, device)
        leaves = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}
        grad = draw(*inputs["q1"].shape[:-1], self.value_width)
        call = functools.partial(diff_attn_func, causal=self.causal, out_scale=0.8, deterministic=self.deterministic)

        def run(name: str) -> dict[str, Tensor]:
            out = call(**inputs, backend=name)
            assert isinstance(out, Tensor)
            gradients = torch.autograd.grad(out, list(leaves.values()), grad)
            return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}

        return run


@dataclass(frozen=True)
class Decoding:
    """One new token for each row against a full cache of ``tokens``, k1 and k2 side by side in
    it.
    """

    width: int
    value_width: int
    ratio: int
    noise_heads: int
    """As many as key and value heads."""
    tokens: int
    batch: int
    gate: bool = False
    """In the place of the sub-norm."""

    def size(self, kernel: str) -> int:
        """Attention's size in the tables."""
        return tuning.attention_size(self.width, self.value_width, DTYPE.itemsize)

    def describe(self) -> str:
        """In words."""
        heads = f"({self.width}, {self.value_width}), {self.ratio * self.noise_heads}:{self.noise_heads} heads"
        return f"{heads}, a token after {self.batch} x {self.tokens:,}" + (", epilogue gate" if self.gate else "")

    def launches(self, kernel: str, device: torch.device) -> Launch:
        """Of decoding_split, with the kernel that joins its parts: into how many it splits depends
        on its entry.
        """
        draw = draw_from(0, DTYPE, device)
        keys = draw(self.batch, self.tokens, self.noise_heads, 2 * self.width)
        signal_heads = self.ratio * self.noise_heads
        arguments: dict[str, Any] = {
            "q1": draw(self.batch, 1, signal_heads, self.width),
            "k1_cache": keys[..., : self.width],
            "q2": draw(self.batch, 1, self.noise_heads, self.width),
            "k2_cache": keys[..., self.width :],
            "v_cache": draw(self.batch, self.tokens, self.noise_heads, self.value_width),
            "lam": torch.full((), 0.5, device=device),
            "cache_seqlens": torch.full((self.batch,), self.tokens, dtype=torch.int32, device=device),
            "norm_weight": None if self.gate else torch.ones(self.value_width, device=device),
            "gate": draw(self.batch, 1, signal_heads, self.value_width) if self.gate else None,
        }
        return lambda: {"output": diff_attn_with_kvcache(**arguments, causal=True, out_scale=0.8, backend="triton")}
