"""Which head ratio suits a layer of your own: models of equal parameters, trained with three seeds.

    python examples/head_ratio_study.py

`OwnAttention` is where yours goes. Losses are compared with those of 1:1, paired by seed.
"""

import torch
from torch import Tensor, nn

from motifarch.layers import GroupedDifferentialAttention, PolyNormMLP
from motifarch.study.analysis import holm, paired
from motifarch.study.intermediate_size import match_intermediate_size

WIDTH, LENGTH, SEEDS, STEPS = 48, 32, range(3), 150
HEADS = {1: 4, 2: 6, 4: 10}  # signal heads a noise head: all heads, two of which are noise heads


class OwnAttention(nn.Module):
    """A short convolution before grouped differential attention, (B, S, WIDTH) to the same."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.norm, self.convolution = nn.RMSNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
        self.attention = GroupedDifferentialAttention(WIDTH, num_heads=HEADS[ratio], ratio=ratio, head_dim=12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.convolution(nn.functional.pad(self.norm(x).mT, (2, 0))).mT)


def build(ratio: int, size: int) -> nn.Module:
    """Bytes (B, S) to logits (B, S, 256)."""
    blocks = OwnAttention(ratio), nn.RMSNorm(WIDTH), PolyNormMLP(WIDTH, intermediate_size=size)
    return nn.Sequential(nn.Embedding(256, WIDTH), *blocks, nn.Linear(WIDTH, 256))


def parameters(ratio: int, size: int) -> int:
    return sum(p.numel() for p in build(ratio, size).parameters())


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


train, held_out = torch.from_file(torch.__file__, size=80_000, dtype=torch.uint8).long().tensor_split([-8192])
sizes = {r: match_intermediate_size(lambda size, r=r: parameters(r, size), parameters(1, 192)) for r in HEADS}
losses: dict[int, dict[int, float]] = {ratio: {} for ratio in HEADS}
for ratio, seed in ((ratio, seed) for ratio in HEADS for seed in SEEDS):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW((model := build(ratio, sizes[ratio])).parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, train[torch.randint(len(train) - LENGTH, (16, 1)) + torch.arange(LENGTH + 1)]).backward()
        optimizer.step()
    losses[ratio][seed] = loss_of(model, held_out.view(-1, LENGTH)).item()
tests = {ratio: paired(losses[ratio], losses[1]) for ratio in HEADS if ratio > 1}
print(f"1:1  {parameters(1, sizes[1])} parameters  loss {sum(losses[1].values()) / len(SEEDS):.3f} nats/byte")
for (ratio, test), p in zip(tests.items(), holm([test.p for test in tests.values()]), strict=True):
    size, loss = parameters(ratio, sizes[ratio]), sum(losses[ratio].values()) / len(SEEDS)
    print(f"{ratio}:1  {size} parameters  loss {loss:.3f} nats/byte  ({test.mean:+.3f}, p = {p:.3f})")
