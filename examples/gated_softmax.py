"""An attention of one's own in a study of head ratios: softmax attention whose output is gated.

Each head's output is multiplied, number by number, by a sigmoid of a projection of the token
(Qiu et al., "Gated Attention for Large Language Models", arXiv 2505.06708). In a grid:

    variants:
      - { attention: softmax_gqa }
      - { attention: "examples.gated_softmax:GatedSoftmax" }
"""

from typing import Any

from torch import Tensor, nn

from motifarch.layers import SoftmaxAttention


class GatedSoftmax(SoftmaxAttention):
    """Softmax attention with an elementwise sigmoid gate before the output's projection.

    Takes the arguments of `motifarch.layers.SoftmaxAttention`; the gate is one more projection,
    from (B, S, hidden_size) to (B, S, num_heads, head_dim).
    """

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        self.gate_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=False)

    def _gate(self, hidden_states: Tensor) -> Tensor:
        return self.gate_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
