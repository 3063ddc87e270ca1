"""A differential attention layer in a model of your own: a small transformer learns to copy.

    python examples/layer_in_your_model.py

The layer needs torch alone. Ten heads are eight signal heads in two groups, each with a noise head.
"""

import torch
from torch import Tensor, nn

from motifarch.layers import GroupedDifferentialAttention, PolyNormMLP, RotaryEmbedding

WIDTH, HEAD_DIM, VOCABULARY, HALF = 64, 16, 16, 8


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised residual stream (B, S, WIDTH)."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        heads = {"num_heads": 10, "num_noise_heads": 2, "num_kv_heads": 4, "head_dim": HEAD_DIM}
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = GroupedDifferentialAttention(WIDTH, **heads, layer_idx=layer_idx)
        self.feed_forward = PolyNormMLP(WIDTH, intermediate_size=2 * WIDTH)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Model(nn.Module):
    """Token ids (B, S) to logits (B, S, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.rotary, self.blocks = RotaryEmbedding(HEAD_DIM), nn.ModuleList(map(Block, range(2)))
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, positions = self.embedding(ids), self.rotary(torch.arange(ids.shape[1])[None])
        for block in self.blocks:
            x = block(x, positions)
        return self.output(x)


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(201):
    half = torch.randint(VOCABULARY, (32, HALF))
    ids = torch.cat([half, half], dim=1)  # the second half repeats the first
    logits = model(ids[:, :-1])[:, HALF - 1 :]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, HALF:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f} nats/token")
