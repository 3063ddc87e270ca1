"""What every attention layer shares: one forward pass, head shapes, positions, the cache, a
context, masks, and packed or padded batches.

Shapes: B batch, S tokens, E hidden size, D head_dim of queries and keys, Dv of values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from motif_kernels import diff_decoding, dispatch
from motif_kernels.flops import visible_pairs
from motif_kernels.ops import is_exporting
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache, Sequences
from motifarch.layers.attention_maps import attend_by_maps, read_mask, visible_keys
from motifarch.layers.cache import CachePosition, held_width
from motifarch.layers.halo import add_halos, documents_with_halo
from motifarch.layers.head_norm import SubNorm, attend_normed
from motifarch.layers.masked_attention import attend_masked, is_plain
from motifarch.layers.other_attention import attend_with
from motifarch.layers.padding import PaddingMask, read_padding
from motifarch.layers.rotary import PositionEmbeddings
from motifarch.layers.ulysses import gather_heads, scatter_inputs

Batch = Sequences | PaddingMask | Cache | None
"""What a call's tokens are: packed, padded, new ones after a cache, or neither."""

_NOT_WITH_CONTEXT = {
    "position_embeddings": "they are those of tokens that are queries and keys alike",
    "past_key_values": "a context is given whole in each call",
    "cu_seqlens": "contexts lie in a batch; say with padding which of their tokens are real",
    "context parallelism": "its ranks hold parts of one sequence",
    "window_size": "a context has no positions",
}

AttentionHook = Callable[[AttentionInputs, Batch], None]

Attend = Callable[["BaseAttention", Tensor, Tensor, Tensor], Tensor]
"""Softmax attention of a layer's queries, keys and values."""


class CoreOptions(TypedDict, total=False):
    """Keyword arguments of every attention layer, which :class:`BaseAttention` describes."""

    window_size: tuple[int, int]
    causal: bool
    softmax_scale: float | None
    dropout: float
    backend: str


class Heads(NamedTuple):
    """What a layer makes of its tokens, for attention."""

    query: Tensor
    """(B, S, H, D), signal and noise, normalised and rotated."""
    key: Tensor
    """(B, keys, heads, width); of this call's tokens, before :meth:`BaseAttention._read`."""
    value: Tensor
    """(B, keys, heads, Dv)."""
    gate: Tensor | None = None
    """What the output is gated with, (B, S, Hs, Dv)."""
    is_latent: bool = False
    """Whether attention gives latents, for which :meth:`BaseAttention._output` has the gate."""


class BaseAttention(nn.Module):
    """Base of the attention layers: everything but where queries, keys and values come from, and
    what the noise is.

    Query heads lie as ``num_noise_heads`` blocks of [g signal heads, 1 noise head]; without noise
    heads it is softmax attention. A subclass gives heads (:meth:`_project`), lambda
    (:meth:`_lambda`) and the output's projection (:meth:`_output`), and sets ``subln`` for a
    sub-norm.

    Args:
        num_heads: signal and noise heads together.
        num_noise_heads: noise heads, 0 for softmax attention.
        num_kv_heads: key/value heads, before pairing.
        head_dim: D.
        v_head_dim: Dv, width of a value.
        layer_idx: position in the model from 0: the cache's key, without which it takes none.
        paired_kv: key heads come in pairs, one for signal and one for noise.
        lambda_init: a constant in lambda; with the sub-norm the output is scaled by
            ``1 - lambda_init``.
        window_size: inclusive (left, right) attention window, -1 for unbounded.
        causal: a token sees none after it; False is for encoders, and takes no cache. A context's
            tokens are all seen.
        softmax_scale: multiplies the logits; default ``head_dim ** -0.5``.
        dropout: in training mode, the share of each softmax map's probabilities, signal and noise,
            that are left out (the rest are scaled up); they are dropped before the maps are
            subtracted.
        backend: motif_kernels' backend. No kernel knows masks of one's own and dropout: torch's
            attention serves them, or "reference".
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_noise_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        layer_idx: int | None,
        paired_kv: bool = False,
        lambda_init: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        causal: bool = True,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}; it must be at least 0 and less than 1")
        self.num_heads, self.num_noise_heads, self.num_kv_heads = num_heads, num_noise_heads, num_kv_heads
        self.head_dim, self.v_head_dim, self.paired_kv = head_dim, v_head_dim, paired_kv
        self.layer_idx, self.lambda_init = layer_idx, lambda_init
        self.window_size, self.causal = (window_size[0], window_size[1]), causal
        self.softmax_scale, self.dropout, self.backend = softmax_scale, dropout, backend
        self.subln: SubNorm | None = None
        """The sub-norm, which a subclass may set."""
        self.tensor_group: ProcessGroup | None = None
        """Ranks that share the heads (tensor parallelism): :meth:`share_heads` sets it."""
        self.context_group: ProcessGroup | None = None
        """Ranks that each hold a part of the sequence (context parallelism): set from outside. They
        exchange tokens for heads (:attr:`head_group`), or with a window its keys.
        """
        self.record_max_logits = False
        """Whether forward passes in training mode record each head's largest logit, for QK-clip."""
        self.max_logits: tuple[Tensor, Tensor | None] | None = None
        """Largest scaled, unmasked logits since this was last cleared, of the signal heads (Hs,)
        and noise heads (Hn,) that this rank computes; None without noise heads.
        """
        self.last_lambda: Tensor | None = None
        """Mean lambda of the last forward pass; None without noise heads."""
        self.attention_hook: AttentionHook | None = None
        """Called in each forward pass with the final queries, keys, values and lambda, (B, S,
        heads, width), and with what kind of batch they are: to observe attention.
        """

    def share_heads(self, group: ProcessGroup) -> None:
        """Tells the layer that the ranks of a group each have a part of its heads (tensor
        parallelism), in its projections' outputs.

        The gradients of what all heads share are then summed over them.
        """
        self.tensor_group = group

    @property
    def cache_width(self) -> int:
        """Numbers that a token takes in the cache."""
        return self.num_kv_heads * 2 * self.head_dim

    def attention_flops(self, seq_len: int) -> float:
        """Floating-point operations of attention in one sequence's forward pass, without the
        projections: ``2 (D + Dv)`` for each head and visible pair. A subclass that does something
        else says what it takes.
        """
        pairs = visible_pairs(seq_len, seq_len, self.causal, self.window_size)
        return 2.0 * self.num_heads * (self.head_dim + self.v_head_dim) * pairs

    @property
    def head_group(self) -> ProcessGroup | None:
        """Ranks that share the heads while attention runs (Ulysses): those of context parallelism,
        unless a window makes a halo do.
        """
        return None if self.causal and self.window_size[0] >= 0 else self.context_group

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        *,
        context: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        past_key_values: Any | None = None,
        padding: Tensor | PaddingMask | None = None,
        cache_position: CachePosition | None = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool = False,
        attend: Attend | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over a batch, packed documents, new tokens after a cache, or a context.

        Args:
            hidden_states: (B, S, E); packed documents are one row (1, total, E).
            position_embeddings: cosines and sines (B or 1, S, head_dim) from RotaryEmbedding; None
                leaves positions out.
            context: (B, Sk, context_dim), tokens that keys and values are made of in place of
                hidden_states (cross-attention); all are seen, but padding. With it there are no
                position_embeddings, windows, cache or packed documents.
            cu_seqlens: (documents + 1,) int32 bounds of packed documents, which never attend to
                each other.
            max_seqlen: the longest document (or more); with cu_seqlens.
            past_key_values: a transformers Cache of num_kv_heads heads of width head_dim; with
                paired key heads of half as many heads of 2 * head_dim, k1 and k2 side by side.
            padding: (B, keys) bool or integers, true for a token that is real, cached ones
                included; with a context, its tokens. Or that as a PaddingMask, which layers share.
            cache_position: where past_key_values stands before this call; by default it is asked.
                With tokens padded on the left in the cache, it says how many.
            attn_mask: (S, keys), or what broadcasts to (B, num_heads, S, keys): bool, True where a
                token sees a key, or floats that are added to the logits, as in torch's
                scaled_dot_product_attention. It stands in place of the layer's causality and
                window. Heads, signal and noise, are in q_proj's order. Keys are those that
                past_key_values gives, a static cache's empty places included.
            output_attentions: return the maps too; they are materialised, as they are where the
                call is exported.
            attend: softmax attention to take in place of motif_kernels': called with the layer,
                queries (B, S, H, width) of all heads as q_proj has them, and keys and values (B,
                keys, heads, width), those of past_key_values included; gives (B, S, H, Dv). What
                each token sees is its own affair. With paired_kv, width is 2 D: keys are k1 and k2
                side by side, and queries have zeros beside them. It serves neither a context nor
                masks, maps or dropout.

        Returns:
            Tensor (B, S, E); with output_attentions also the softmax probabilities (B, num_heads,
            S, keys), float32, of signal and noise heads as q_proj has them, and as dropout leaves
            them. With A1 a signal head's and A2 its noise head's, the layer weighs values by
            ``A1 - lambda A2``.

        Raises:
            ValueError: gradients are wanted through a cache that is written in place, or arguments
                do not fit.
        """
        dropout = self.dropout if self.training else 0.0
        if context is not None:
            given = {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
            self._check_context(**given, cu_seqlens=cu_seqlens)
        if attend is not None:
            unserved = {"padding": padding, "cu_seqlens": cu_seqlens, "attn_mask": attn_mask, "context": context}
            self._check_attend(**unserved, output_attentions=output_attentions, dropout=dropout > 0)
        if attn_mask is not None and (padding is not None or cu_seqlens is not None):
            name = "cu_seqlens" if padding is None else "padding"
            raise ValueError(f"attn_mask and {name} were both given; let attn_mask alone say what each token sees")
        by_maps = output_attentions or (attend is None and is_exporting())
        free = by_maps or attn_mask is not None or dropout > 0
        heads = self._project(hidden_states, position_embeddings, context)
        key, value, cache = self._append(
            heads.key,
            heads.value,
            past_key_values,
            cache_position,
            needs_full_cache=padding is not None or attend is not None,
            from_cache=free or attend is not None,
        )
        batch: Batch = cache
        if padding is not None and batch is None:
            num_keys = key.shape[1] if past_key_values is None else None
            rows, tokens = hidden_states.shape[:2]
            batch = read_padding(padding, rows, tokens, num_keys, of_context=context is not None)
        if cu_seqlens is not None and batch is None:
            if max_seqlen is None:
                raise ValueError("cu_seqlens was given without max_seqlen; give both for packed documents")
            batch = Sequences(max_seqlen, max_seqlen, cu_seqlens, cu_seqlens)
        heads = heads._replace(key=key, value=value)
        if self.context_group is not None:
            if past_key_values is not None or padding is not None:
                kind = "a cache" if padding is None else "padding"
                raise ValueError(f"context parallelism does not serve {kind}; pack documents instead (cu_seqlens)")
            if self.head_group is None:
                heads, batch = self._with_halo(heads, batch, self.context_group)
        heads = self._read(heads, from_cache=cache is not None)
        inputs = self._inputs(heads, hidden_states)
        out_scale = 1.0 if self.subln is None else 1.0 - self.lambda_init
        causal = self.causal and context is None
        maps: list[Tensor] | None = [] if by_maps or self.backend == "reference" else None
        run: Callable[..., Tensor]
        if attend is not None:
            run = partial(self._attend_with, attend)
        elif free:
            run = partial(self._attend_freely, batch, causal, attn_mask, dropout, maps)
        else:
            run = partial(self._attend, batch, causal)
        out = self._output(attend_normed(self.subln, out_scale, inputs, run), heads)
        return (out, maps[0]) if output_attentions and maps else out

    def _check_context(self, **given: Any) -> None:
        """Raise ValueError for what does not go with a context."""
        given |= {"context parallelism": self.context_group}
        given |= {"window_size": None if self.window_size == (-1, -1) else self.window_size}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} and context do not go together: {_NOT_WITH_CONTEXT[name]}")

    def _check_attend(self, **given: Any) -> None:
        """Raise ValueError for what another attention than motif_kernels' does not serve."""
        given |= {"context parallelism": self.context_group, "QK-clip": self.record_max_logits and self.training}
        if names := [name for name, value in given.items() if value is not None and value is not False]:
            raise ValueError(
                f"{', '.join(names)}: not served by an attention that is given with attend; leave it out, or let "
                "motif_kernels attend (a model's attn_implementation 'auto')"
            )

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        """Lambda, a scalar or (B, S, Hs); asked where there are noise heads."""
        raise NotImplementedError

    def _project(
        self, hidden_states: Tensor, position_embeddings: PositionEmbeddings | None, context: Tensor | None
    ) -> Heads:
        """Heads of this call's tokens; keys and values (B, S, heads, width) as the cache holds
        them.
        """
        raise NotImplementedError

    def _read(self, heads: Heads, *, from_cache: bool) -> Heads:
        """Keys and values to attend to, of what the cache holds, this call's tokens included.

        Args:
            heads: with keys and values as the cache holds them.
            from_cache: whether they are a cache that held tokens before.
        """
        return heads

    def _output(self, attended: Tensor, heads: Heads) -> Tensor:
        """(B, S, Hs, Dv) -> (B, S, E)."""
        raise NotImplementedError

    def _inputs(self, heads: Heads, hidden_states: Tensor) -> AttentionInputs:
        """Heads as signal and noise, lambda and the gate."""
        q, key, value = heads[:3]
        gate = None if heads.is_latent else heads.gate
        if not self.num_noise_heads:
            return AttentionInputs(q, key, None, None, value, None, gate=gate)
        group = self.num_heads // self.num_noise_heads - 1
        # All noise heads, or those of this rank. A split, whose gradient is one copy.
        signal, noise = q.view(*q.shape[:2], -1, group + 1, q.shape[-1]).split((group, 1), dim=3)
        k1, k2 = key.chunk(2, dim=-1) if self.paired_kv else (key, key)
        lam = self._lambda(hidden_states)
        if not is_exporting():
            self.last_lambda = lam.detach().mean() if lam.ndim else lam.detach()
        return AttentionInputs(signal.flatten(2, 3), k1, noise.squeeze(3), k2, value, lam, gate=gate)

    def _options(self, norm_eps: float, out_scale: float, causal: bool) -> AttentionOptions:
        return AttentionOptions.of(
            self.head_dim,
            softmax_scale=self.softmax_scale,
            causal=causal,
            window_size=self.window_size,
            norm_eps=norm_eps,
            out_scale=out_scale,
            return_max_logits=self.record_max_logits and self.training,
        )

    def _append(
        self,
        key: Tensor,
        value: Tensor,
        past_key_values: Any | None,
        position: CachePosition | None,
        *,
        needs_full_cache: bool,
        from_cache: bool = False,
    ) -> tuple[Tensor, Tensor, Cache | None]:
        """Append to the cache, and say what the queries attend to.

        Args:
            key: (B, S, heads, width), this call's.
            value: (B, S, heads, Dv).
            past_key_values: a transformers Cache, or None.
            position: where the cache stands; by default the cache is asked.
            needs_full_cache: a mask follows that speaks of every cached token.
            from_cache: give what the cache holds, also where it held nothing before.

        Returns:
            Keys and values, (B, Sk, heads, width), and what they hold where they are a
            cache that held tokens before.

        Raises:
            ValueError: gradients are wanted through a cache that is written in place, or the layer
                is not causal.
        """
        if past_key_values is None:
            return key, value, None
        if not self.causal:
            raise ValueError("a layer with causal=False takes no past_key_values: its tokens see those that follow")
        if self.layer_idx is None:
            raise ValueError("past_key_values keeps keys by layer, and layer_idx is None; give the layer its position")
        position = CachePosition.of(past_key_values, self.layer_idx, key) if position is None else position
        in_place = bool(getattr(past_key_values, "is_compileable", False))
        with_gradient = torch.is_grad_enabled() and not is_exporting()
        if in_place and with_gradient and key.requires_grad:
            raise ValueError(
                f"a {type(past_key_values).__name__} gives no gradients, for it is written in place; call under "
                "torch.no_grad(), or take a DynamicCache"
            )
        new: tuple[Tensor, ...] = (key, value)
        if in_place and self.paired_kv:
            width = held_width(past_key_values, self.layer_idx, key.shape[-1])
            new = tuple(t.reshape(*t.shape[:2], -1, width) for t in new)
        keys, values = past_key_values.update(*(t.transpose(1, 2) for t in new), self.layer_idx)
        if position.is_start and not from_cache:
            return key, value, None
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if new[0].shape != key.shape:
            keys, values = (t.reshape(*t.shape[:2], *key.shape[2:]) for t in (keys, values))
        if needs_full_cache or (with_gradient and keys.requires_grad):
            return keys, values, None
        return keys, values, Cache(*position.within(keys.shape[1]))

    def _attend(
        self,
        batch: Batch,
        causal: bool,
        inputs: AttentionInputs,
        *,
        norm_weight: Tensor | None,
        norm_eps: float,
        out_scale: float,
    ) -> Tensor:
        """Attention of (B, S, heads, width) tensors and what follows it: (B, S, Hs, Dv), 0 in rows
        of padding.
        """
        inputs, options = inputs._replace(norm_weight=norm_weight), self._options(norm_eps, out_scale, causal)
        if self.attention_hook is not None:
            self.attention_hook(inputs, batch)
        if self.head_group is not None:
            inputs = scatter_inputs(inputs, self.head_group)
        if isinstance(batch, Cache):
            return diff_decoding.attend(inputs, batch, options, self.backend)
        shape, documents, packed = inputs.q1.shape[:2], None, None
        if isinstance(batch, Sequences):
            inputs, documents = inputs.map(lambda t: t.flatten(0, 1)), batch
        elif batch is not None:
            packed = batch.pack(inputs.k1.shape[1])
            of_queries, of_keys = packed.query_index, packed.key_index
            inputs = inputs.map(lambda t: t.flatten(0, 1)[of_queries], lambda t: t.flatten(0, 1)[of_keys])
            bounds = packed.cu_seqlens_q, packed.cu_seqlens_k
            documents = Sequences(packed.max_seqlen_q, packed.max_seqlen_k, *bounds)
        out, *max_logits = dispatch.attend(inputs, options, documents, self.backend)
        if max_logits:
            self._record(max_logits)
        if packed is not None:
            padded = out.new_zeros(shape.numel(), *out.shape[1:])
            out = padded.index_copy(0, packed.query_index, out)
        if documents is not None:
            out = out.unflatten(0, shape)
        return out if self.head_group is None else gather_heads(out, self.head_group)

    def _attend_freely(
        self,
        batch: Batch,
        causal: bool,
        mask: Tensor | None,
        dropout: float,
        maps: list[Tensor] | None,
        inputs: AttentionInputs,
        *,
        norm_weight: Tensor | None,
        norm_eps: float,
        out_scale: float,
    ) -> Tensor:
        """The same with what no kernel knows, a mask or dropout, by torch's attention; or by maps
        (B, heads, S, keys), which are appended to ``maps``.
        """
        inputs, options = inputs._replace(norm_weight=norm_weight), self._options(norm_eps, out_scale, causal)
        if self.attention_hook is not None:
            self.attention_hook(inputs, batch)
        if self.context_group is not None:
            raise ValueError("context parallelism has no attention maps, no dropout, and no mask but that of documents")
        by_maps = maps is not None or options.return_max_logits
        if mask is not None:
            mask = read_mask(mask, inputs)
        elif by_maps or batch is not None or not is_plain(inputs, options):
            mask = visible_keys(inputs, batch, options.window_size)
        if mask is None or not by_maps:
            return attend_masked(inputs, mask, options, dropout)
        attended = attend_by_maps(inputs, mask, options, dropout)
        if maps is not None:
            maps.append(attended.maps)
        if options.return_max_logits:
            self._record(attended.max_logits)
        return attended.output

    def _attend_with(
        self,
        attend: Attend,
        inputs: AttentionInputs,
        *,
        norm_weight: Tensor | None,
        norm_eps: float,
        out_scale: float,
    ) -> Tensor:
        """The same by another softmax attention."""
        inputs, options = inputs._replace(norm_weight=norm_weight), self._options(norm_eps, out_scale, self.causal)
        if self.attention_hook is not None:
            self.attention_hook(inputs, None)
        return attend_with(partial(attend, self), inputs, options, paired_kv=self.paired_kv)

    def _record(self, found: list[Tensor]) -> None:
        """Leaves the largest logits, or those of the calls before, in :attr:`max_logits`."""
        before = self.max_logits or (None, None)
        # A maximum in the first call too: a call that is recomputed must do what it did, or
        # checkpointing is lost.
        found = [torch.maximum(f, f if t is None else t) for f, t in zip(found, before, strict=False)]
        self.max_logits = found[0], found[1] if len(found) > 1 else None

    def _with_halo(self, heads: Heads, batch: Batch, group: ProcessGroup) -> tuple[Heads, Batch]:
        """Ranks hold parts of the sequence: they send the keys and values that others' windows
        reach back to.
        """
        left, (rows, tokens) = self.window_size[0], heads.key.shape[:2]
        if isinstance(batch, Sequences):
            if rows > 1:
                raise ValueError(
                    f"packed documents lie in {rows} rows; with context parallelism give one row (1, total)"
                )
            batch = documents_with_halo(batch, tokens, left, group)
        key, value = add_halos((heads.key, heads.value), left, group)
        return heads._replace(key=key, value=value), batch
