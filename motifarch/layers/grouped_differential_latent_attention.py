"""GDLA (Motif-3, arXiv 2608.09119): grouped differential attention over latent keys and values;
without noise heads it is multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

Shapes: B batch, S tokens, E hidden size, H query heads, Hs signal heads, Hk key/value heads, D
width of a query and key, Dv of a value, R rank of the latents.
"""

from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from motif_kernels.ops import is_exporting
from motifarch.layers.base_attention import BaseAttention, CoreOptions, Heads
from motifarch.layers.group_sum import sum_gradient
from motifarch.layers.head_counts import check_heads, noise_heads_of
from motifarch.layers.linear_weight import linear_weight
from motifarch.layers.rms_norm import RMSNorm
from motifarch.layers.rotary import PositionEmbeddings, rotate_heads
from motifarch.layers.wide_linear import WideLinear


class GroupedDifferentialLatentAttention(BaseAttention):
    """Differential attention in which a group of signal heads shares a noise head, a key and a
    value, all made from low-rank latents.

    Queries come from a normalised latent of the token, ``wq_b(q_norm(wq_a(x)))``, and so does the
    output's gate; keys and values from another, ``wkv_b(kv_norm(latent))``. The last
    ``qk_rope_head_dim`` columns of queries and keys alone are rotated; those of the key are one
    vector for all heads, beside the latent in ``wkv_a``. Query heads lie as ``num_noise_heads``
    blocks of [g signal heads, 1 noise head]; lambda is ``sigmoid(x W)`` for each token and signal
    head. There is no sub-norm. Parameter names are those of the released Motif-3.

    A cache holds R + qk_rope_head_dim numbers a token, and new tokens attend to the latents
    themselves where that is less work (the "absorbed" form): the two maps are subtracted there, so
    that signal heads alone are projected up. With a window it holds the heads' keys and values.

    Args:
        hidden_size: E.
        num_heads: signal and noise heads together: 80 in Motif-3.
        ratio: signal heads a noise head: 4 there.
        num_noise_heads: noise heads, in place of ratio: 16 there; 0 is softmax attention.
        num_kv_heads: key/value heads; must divide num_noise_heads. Default: one for each noise
            head; without noise heads one for each head.
        head_dim: D, of which qk_rope_head_dim columns are rotated: 192 there.
        qk_rope_head_dim: even, less than head_dim: 64 there.
        v_head_dim: Dv: 128 there; default head_dim - qk_rope_head_dim.
        q_lora_rank: rank of the queries' latent: 1024 there.
        kv_lora_rank: R: 512 there.
        gate: multiply the difference by ``sigmoid`` of a projection of the queries' latent,
            elementwise.
        norm_eps: epsilon of the latents' norms.
        layer_idx: position in the model from 0: the key in a cache, which a layer without one does
            not take.
        device: where the parameters are made.
        dtype: their dtype.
        **options: of every attention layer
            (:class:`~motifarch.layers.base_attention.BaseAttention`):
            ``window_size``, ``causal``, ``softmax_scale``, ``dropout`` and ``backend``.

    Position embeddings are of width qk_rope_head_dim.

    Where ranks share the heads (:meth:`share_heads`), ``wq_b``, ``wq_b_gate`` and ``wkv_b`` give
    this rank's; what comes before them is whole on every rank. Who cuts these three sums the
    gradients of their inputs, the latents, over the ranks.

    Raises:
        ValueError: heads that do not divide, widths that do not fit, or neither or both of ratio
            and num_noise_heads.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        ratio: int | None = None,
        num_noise_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int | None = None,
        q_lora_rank: int,
        kv_lora_rank: int,
        gate: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[CoreOptions],
    ) -> None:
        noise_heads = noise_heads_of(num_heads, ratio, num_noise_heads)
        if num_kv_heads is None:
            num_kv_heads = noise_heads or num_heads
        if noise_heads:
            check_heads(num_heads, noise_heads, num_kv_heads, paired_keys=False)
        elif num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        check_rotary_part(head_dim, qk_rope_head_dim)
        plain = head_dim - qk_rope_head_dim
        v_head_dim = plain if v_head_dim is None else v_head_dim
        super().__init__(
            num_heads=num_heads,
            num_noise_heads=noise_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            layer_idx=layer_idx,
            **options,
        )
        self.kv_lora_rank, self.qk_rope_head_dim, self._plain = kv_lora_rank, qk_rope_head_dim, plain
        signal_heads = num_heads - noise_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        linear: dict[str, Any] = {"bias": False, **factory}
        self.wq_a = nn.Linear(hidden_size, q_lora_rank, **linear)
        self.q_norm = RMSNorm(q_lora_rank, eps=norm_eps, **factory)
        self.wq_b = nn.Linear(q_lora_rank, num_heads * head_dim, **linear)
        self.wq_b_gate = nn.Linear(q_lora_rank, signal_heads * v_head_dim, **linear) if gate else None
        self.wkv_a = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, **linear)
        self.kv_norm = RMSNorm(kv_lora_rank, eps=norm_eps, **factory)
        self.wkv_b = nn.Linear(kv_lora_rank, num_kv_heads * (plain + v_head_dim), **linear)
        self.lambda_proj = WideLinear(hidden_size, signal_heads, device=device, dtype=dtype) if noise_heads else None
        self.wo = nn.Linear(signal_heads * v_head_dim, hidden_size, **linear)

    @property
    def cache_width(self) -> int:
        """Numbers that a token takes in the cache: of the latent, or with a window of the heads."""
        if self._caches_latents:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)

    @property
    def _caches_latents(self) -> bool:
        return self.window_size[0] < 0

    @property
    def _keeps_latents(self) -> bool:
        """Whether keys stay latents until they are read. As such they go to other ranks too: 576
        numbers a token in Motif-3, in place of 16 x 320.
        """
        return self._caches_latents or self.context_group is not None

    def compute_lambda(self, hidden_states: Tensor) -> Tensor:
        """Lambda of each token and signal head of this rank, (B, S, Hs), float32 (float64)."""
        assert self.lambda_proj is not None
        logits = self.lambda_proj(hidden_states)
        if self.tensor_group is not None:
            # All heads' on each rank: their gradient is far less to send than that of the input.
            logits = sum_gradient(logits, self.tensor_group)
            logits = logits.chunk(dist.get_world_size(self.tensor_group), -1)[dist.get_rank(self.tensor_group)]
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        return self.compute_lambda(hidden_states)

    def _project(
        self, hidden_states: Tensor, position_embeddings: PositionEmbeddings | None, context: Tensor | None
    ) -> Heads:
        context = hidden_states if context is None else context
        query_latent = self.q_norm(self.wq_a(hidden_states))
        query = self.wq_b(query_latent).unflatten(-1, (-1, self.head_dim))
        latent, rotated = self.wkv_a(context).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        rotated = sum_gradient(rotated, self.tensor_group).unsqueeze(2)
        if position_embeddings is not None:
            plain, turned = query.split((self._plain, self.qk_rope_head_dim), dim=-1)
            turned, rotated = rotate_heads(turned, rotated, position_embeddings)
            query = torch.cat((plain, turned), dim=-1)
        gate = None if self.wq_b_gate is None else self.wq_b_gate(query_latent).unflatten(-1, (-1, self.v_head_dim))
        key = torch.cat((self.kv_norm(latent).unsqueeze(2), rotated), dim=-1)
        heads = Heads(query, key, key[..., :0], gate)  # the latent is key and value
        return heads if self._keeps_latents else self._expand(heads)

    def _expand(self, heads: Heads) -> Heads:
        """Keys and values (B, keys, Hk, D and Dv) of latents (B, keys, 1, R + rotated)."""
        latent, rotated = heads.key.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        both = self.wkv_b(latent.squeeze(2)).unflatten(-1, (-1, self._plain + self.v_head_dim))
        plain, value = both.split((self._plain, self.v_head_dim), dim=-1)
        rotated = rotated.expand(-1, -1, both.shape[2], -1)
        return heads._replace(key=torch.cat((plain, rotated), dim=-1), value=value)

    def _read(self, heads: Heads, *, from_cache: bool) -> Heads:
        if not self._keeps_latents:
            return heads
        new, keys = heads.query.shape[1], heads.key.shape[1]
        return self._absorb(heads) if from_cache and self._absorbs(new, keys) else self._expand(heads)

    def _absorbs(self, new: int, keys: int) -> bool:
        """Whether attention to the latents is less work than their projection to keys and values:
        for each key, wider products of all queries against one up-projection.
        """
        if is_exporting() or new >= keys:
            return False
        wider = 2 * self.kv_lora_rank + self.qk_rope_head_dim - self.head_dim - self.v_head_dim
        return new * self.num_heads * wider < self.kv_lora_rank * self.num_kv_heads * (self._plain + self.v_head_dim)

    def _absorb(self, heads: Heads) -> Heads:
        """Queries of the latents themselves: ``q W k`` is ``(q W) k``."""
        plain, rotated = heads.query.split((self._plain, self.qk_rope_head_dim), dim=-1)
        by_key = plain.unflatten(2, (-1, self.num_heads // self.num_kv_heads))
        absorbed = torch.einsum("bsghn,gnr->bsghr", by_key, self._up(heads)[:, : self._plain])
        query = torch.cat((absorbed.flatten(2, 3), rotated), dim=-1)
        return heads._replace(query=query, value=heads.key[..., : self.kv_lora_rank], is_latent=True)

    def _up(self, heads: Heads) -> Tensor:
        """wkv_b's matrix by key/value head, (Hk, plain + Dv, R)."""
        latents = heads.key[..., : self.kv_lora_rank]
        return linear_weight(self.wkv_b, latents).unflatten(0, (-1, self._plain + self.v_head_dim))

    def _output(self, attended: Tensor, heads: Heads) -> Tensor:
        if heads.is_latent:
            up = self._up(heads)[:, self._plain :]
            by_value = attended.unflatten(2, (len(up), -1))
            attended = torch.einsum("bsghr,gvr->bsghv", by_value, up).flatten(2, 3)
            if heads.gate is not None:
                attended = attended * torch.sigmoid(heads.gate)
        out: Tensor = self.wo(attended.flatten(2))
        return out

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"signal_heads={self.num_heads - self.num_noise_heads}, noise_heads={self.num_noise_heads}, "
            f"kv_heads={self.num_kv_heads}, head_dim={self.head_dim} ({self.qk_rope_head_dim} rotated), "
            f"v_head_dim={self.v_head_dim}, gate={self.wq_b_gate is not None}, window_size={self.window_size}"
        )


def check_rotary_part(head_dim: int, qk_rope_head_dim: int) -> None:
    """Raise ValueError unless an even part of the head is rotated, and some of it is not."""
    if not 0 < qk_rope_head_dim < head_dim or qk_rope_head_dim % 2:
        raise ValueError(
            f"qk_rope_head_dim={qk_rope_head_dim} does not fit head_dim={head_dim}: it is the part of a head that is "
            f"rotated in pairs, so give an even number from 2 to {head_dim - 1}"
        )
