"""Numbers that several implementations of one operation have to agree on."""

# PolyNorm multiplies x by this power of two (exactly) before raising it to the sixth power, and
# scales eps to match: rows of any length then stay finite in float32 for |x| up to 1e6, and the
# products r_k^2 of the backward pass stay normal numbers.
POWER_SCALE = 2.0**-10

# Hyper-connections: what the logits of gates and of mixing matrices are clamped to, and the least
# that Sinkhorn's iterations divide by.
GATE_BOUND, MIX_BOUND = 10.0, 20.0
LEAST_SUM = 1e-8
