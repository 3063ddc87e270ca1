"""What the backward pass needs before it walks: the epilogue's own backward.

For each token and noise head, dA of its signal heads, dO2, the deltas and dlambda, and the
gradients of the sub-norm's weight and the gate; see ``attention_backward.py`` for the formulas.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def _prepare_kernel(
    grad_pointer,
    a_pointer,
    o2_pointer,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    inverse_rms_pointer,
    lse1_pointer,
    d_a_pointer,
    d_o2_pointer,
    delta1_pointer,
    delta2_pointer,
    d_lam_pointer,
    d_weight_pointer,
    d_gate_pointer,
    tokens,
    noise_heads,
    grad_token,
    grad_head,
    lam_token,
    lam_head,
    gate_token,
    gate_head,
    out_scale,
    HAS_NOISE: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    TILES: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A program goes through TILES tiles of PAIRS (token, noise head) pairs."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_DV)
    heads = noise_heads * GROUP
    if weight_pointer is not None:
        weight = tl.load(weight_pointer + columns, mask=columns < DV, other=0.0).to(tl.float32)[None, :]
        d_weight = tl.zeros([PAIRS, BLOCK_DV], tl.float32)
    for tile in tl.range(TILES):
        pairs = (program * TILES + tile) * PAIRS + tl.arange(0, PAIRS)
        present = pairs < tokens * noise_heads
        # Divided in 32 bits, which is many times faster; offsets need 64.
        t, n = (pairs // noise_heads).to(tl.int64), (pairs % noise_heads).to(tl.int64)
        mask = present[:, None] & (columns < DV)[None, :]
        at = ((t * noise_heads + n) * DV)[:, None] + columns[None, :]
        if HAS_NOISE:
            o2 = tl.load(o2_pointer + at, mask=mask, other=0.0).to(tl.float32)
            d_o2 = tl.zeros([PAIRS, BLOCK_DV], tl.float32)
            delta2 = tl.zeros([PAIRS], tl.float32)
        for i in tl.range(GROUP):
            h = n * GROUP + i
            own = ((t * heads + h) * DV)[:, None] + columns[None, :]  # in contiguous tensors (T, Hs, Dv)
            given = (t * grad_token + h * grad_head)[:, None] + columns[None, :]
            # A fully masked row passes no gradient, whatever stands there.
            seen = tl.load(lse1_pointer + h * tokens + t, mask=present, other=float("inf")) != float("inf")
            seen_mask = mask & seen[:, None]
            g = tl.load(grad_pointer + given, mask=seen_mask, other=0.0).to(tl.float32) * out_scale
            a = tl.load(a_pointer + own, mask=mask, other=0.0).to(tl.float32)
            if HAS_NOISE:
                lam = tl.load(lam_pointer + t * lam_token + h * lam_head, mask=seen, other=0.0).to(tl.float32)
            if gate_pointer is not None:
                gate_at = (t * gate_token + h * gate_head)[:, None] + columns[None, :]
                gate = tl.load(gate_pointer + gate_at, mask=seen_mask, other=0.0).to(tl.float32)
                s = 1 / (1 + tl.exp(-gate))
                g *= s
                d_gate = g * a * (1 - s)
                tl.store(d_gate_pointer + own, d_gate.to(d_gate_pointer.dtype.element_ty), mask=mask)
            if weight_pointer is not None:
                r = tl.load(inverse_rms_pointer + h * tokens + t, mask=seen, other=0.0)[:, None]
                normed = a * r
                d_weight += g * normed
                g *= weight
                g = r * (g - normed * (tl.sum(g * normed, axis=1, keep_dims=True) / DV))
            # What the other kernels multiply is rounded: D must belong to the same numbers.
            rounded = g.to(d_a_pointer.dtype.element_ty)
            tl.store(d_a_pointer + own, rounded, mask=mask)
            g = rounded.to(tl.float32)
            delta1 = tl.sum(g * a, axis=1)
            if HAS_NOISE:
                d_lam = -tl.sum(g * o2, axis=1)
                tl.store(d_lam_pointer + t * heads + h, d_lam, mask=present)
                delta1 -= lam * d_lam
                delta2 += lam * d_lam
                d_o2 -= lam[:, None] * g
            tl.store(delta1_pointer + h * tokens + t, delta1, mask=present)
        if d_o2_pointer is not None:
            rounded = d_o2.to(d_o2_pointer.dtype.element_ty)
            tl.store(d_o2_pointer + at, rounded, mask=mask)
            delta2 = tl.sum(rounded.to(tl.float32) * o2, axis=1)
        if HAS_NOISE:
            tl.store(delta2_pointer + n * tokens + t, delta2, mask=present)
    if weight_pointer is not None:
        d_weight_at = d_weight_pointer + program.to(tl.int64) * DV + columns
        tl.store(d_weight_at, tl.sum(d_weight, axis=0), mask=columns < DV)
