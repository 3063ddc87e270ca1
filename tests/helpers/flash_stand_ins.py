"""flash-attn's signatures and refusals, computed by the reference; float64 is taken as well."""

import sys
import types
from contextlib import contextmanager

import torch

from motif_kernels import reference
from motif_kernels.impl.flash import libraries

DTYPES = (torch.float64, torch.float16, torch.bfloat16)
NAMES = {4: "flash_attn.cute", 2: "flash_attn"}
AMPERE, HOPPER, BLACKWELL, GEFORCE = (8, 0), (9, 0), (10, 0), (12, 0)


def plain(q, k, v, packing, scale, causal, window, softcap):
    """What a library computes: (B, S, H, D), or packed documents."""
    if packing is None:
        mask = reference.attention_mask(q.shape[1], k.shape[1], causal=causal, window_size=window)
        return reference.attention(q, k, v, mask=mask, softmax_scale=scale, softcap=softcap)[0].to(q.dtype)
    mask = reference.packed_attention_mask(*packing, len(q), len(k), causal=causal, window_size=window)
    q, k, v = q[None], k[None], v[None]
    return reference.attention(q, k, v, mask=mask, softmax_scale=scale, softcap=softcap)[0][0].to(q.dtype)


def compute(q, k, v, packing, lengths, *, scale, causal, window, softcap, deterministic):
    """A stand-in's work without its checks and records, to be traced."""
    return plain(q, k, v, packing, scale, causal, window, softcap)


class StandIn:
    """A flash-attn module: records calls, refuses what the library does, computes plainly."""

    def __init__(self, version, capability):
        self.version, self.capability, self.calls = version, capability, []

    def run(self, q, k, v, packing, lengths, *, scale, causal, window, softcap, deterministic):
        _, seqlen_k = lengths
        for t in (q, k, v):
            assert t.dtype in DTYPES
            assert t.ndim == (4 if packing is None else 3)
            assert t.stride(-1) == 1, "the last dimension must be contiguous"
            assert t.shape[-1] % 8 == 0
            assert t.numel()
        assert q.shape[-1] == k.shape[-1]
        assert k.shape[:-1] == v.shape[:-1], "keys and values must have equally many heads"
        assert q.shape[-2] % k.shape[-2] == 0
        backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        self.check_widths(q.shape[-1], v.shape[-1], q.shape[-2] != k.shape[-2], deterministic, softcap, backward)
        call = {"heads": q.shape[-2], "kv_heads": k.shape[-2], "widths": (q.shape[-1], v.shape[-1])}
        self.calls.append(call | {"deterministic": deterministic, "packed": packing is not None})
        left, right = window
        if self.version == 2:
            # Bounds are compared with, and replaced by, the key length.
            left, right = (-1 if side >= seqlen_k else side for side in (left, right))
            right = 0 if causal else right
            if left < 0 <= right:
                left = seqlen_k
            elif right < 0 <= left:
                right = seqlen_k
        return plain(q, k, v, packing, scale, causal, (left, right), softcap)

    def check_widths(self, d, dv, grouped, deterministic, softcap, backward):
        major = self.capability[0]
        if self.version == 2:
            assert d == dv <= 256
        elif major == 9:
            assert d <= 256
            assert dv <= 256
            assert not (backward and grouped and d != dv), "GQA backward requires head_dim == head_dim_v"
        elif major in (10, 11):
            assert max(d, dv) <= 128 or (d, dv) in ((192, 128), (256, 256))
            assert not (backward and softcap and d == 256)
        else:
            assert not (major == 8 and backward)
            assert not (major == 12 and backward and (deterministic or softcap))

    def module(self):
        """The functions under the library's name, with its parameters in its order."""
        module = types.ModuleType(NAMES[self.version])
        module.flash_attn_func, module.flash_attn_varlen_func = getattr(self, f"functions_{self.version}")()
        return module

    # The parameters stand as in the libraries, many on a line.
    # fmt: off
    def functions_2(self):
        def flash_attn_func(
            q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False,
        ):
            options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
            return self.run(q, k, v, None, (q.shape[1], k.shape[1]), **options, deterministic=deterministic)

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None,
        ):
            options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
            packing, lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
            return self.run(q, k, v, packing, lengths, **options, deterministic=deterministic)

        return flash_attn_func, flash_attn_varlen_func

    def functions_4(self):
        def bounds(window_size):
            # A side is at least 0 or None; this library gives -1 on one side alone no meaning.
            assert all(side is None or side >= 0 for side in window_size)
            return tuple(-1 if side is None else side for side in window_size)

        def flash_attn_func(
            q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
            learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
            score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
            block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False,
            gather_bwd_token_chunk=None,
        ):
            options = {"scale": softmax_scale, "causal": causal, "window": bounds(window_size), "softcap": softcap}
            out = self.run(q, k, v, None, (q.shape[1], k.shape[1]), **options, deterministic=deterministic)
            return out, None

        def flash_attn_varlen_func(
            q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
            min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
            softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
            num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
            block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
            scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
            gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
        ):
            options = {"scale": softmax_scale, "causal": causal, "window": bounds(window_size), "softcap": softcap}
            packing, lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
            return self.run(q, k, v, packing, lengths, **options, deterministic=deterministic), None

        return flash_attn_func, flash_attn_varlen_func

    # fmt: on


@contextmanager
def installing(monkeypatch):
    """A function that puts generations of flash-attn on a GPU and returns the newest stand-in."""

    def forget():
        libraries.loaded.clear()
        libraries.find.cache_clear()

    def install(capability, *versions):
        forget()
        for name in NAMES.values():
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
        stand_ins = [StandIn(version, capability) for version in versions]
        for stand_in in stand_ins:
            monkeypatch.setitem(sys.modules, NAMES[stand_in.version], stand_in.module())
        if 4 in versions and 2 not in versions:
            monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # a bare namespace
        monkeypatch.setattr(libraries, "capability", lambda device: capability)
        return stand_ins[0] if stand_ins else None

    yield install
    forget()
