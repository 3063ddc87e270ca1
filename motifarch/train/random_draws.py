"""What a step draws at random: which inputs adapters drop, noise on routers' logits."""

import hashlib

import torch


def seed_draws(seed: int, step: int, rank: int) -> None:
    """Makes the draws of a step the same whenever it is trained, resumed or not.

    Ranks that have the same tokens (`Mesh.token_rank`) draw the same.
    """
    # The text is that of the first version, for runs which go on from its checkpoints.
    digest = hashlib.sha256(f"{seed} {step} {rank} dropout".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
