"""A small GPT of your own with grouped differential attention, trained on a text's bytes.

    python examples/nanogpt.py [TEXT ...]

Ten heads are eight signal heads in two groups, each with a noise head.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from motifarch.layers import GroupedDifferentialAttention, PolyNormMLP, RotaryEmbedding

WIDTH, LENGTH = 64, 64


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised residual stream (B, S, WIDTH)."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = GroupedDifferentialAttention(WIDTH, num_heads=10, ratio=4, layer_idx=layer_idx)
        self.feed_forward = PolyNormMLP(WIDTH, intermediate_size=4 * WIDTH)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """Bytes (B, S) to logits (B, S, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.blocks, self.norm = nn.ModuleList(map(Block, range(2))), nn.RMSNorm(WIDTH)
        self.rotary = RotaryEmbedding(self.blocks[0].attention.head_dim)

    def forward(self, ids: Tensor) -> Tensor:
        x, positions = self.embedding(ids), self.rotary(torch.arange(ids.shape[1])[None])
        for block in self.blocks:
            x = block(x, positions)
        return self.output(self.norm(x))


torch.manual_seed(0)
files = sys.argv[1:] or [torch.__file__]
text = torch.tensor(list(b"".join(Path(file).read_bytes() for file in files)))
optimizer = torch.optim.AdamW((model := GPT()).parameters(), lr=3e-3)
for step in range(81):
    batch = text[torch.randint(len(text) - LENGTH, (12, 1)) + torch.arange(LENGTH + 1)]
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f} nats/byte")
