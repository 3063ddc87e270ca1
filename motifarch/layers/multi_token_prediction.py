"""A layer that predicts one token more (arXiv 2404.19737, 2412.19437)."""

from typing import Any

import torch
from torch import Tensor, nn

from motifarch.layers.rms_norm import RMSNorm


class MultiTokenPrediction(nn.Module):
    """From a model's last hidden states at t and the embedding of token t + 1, hidden states for
    token t + 2.

    ``input_proj([h; norm(embedding)])``, a pre-norm decoder block and a last norm; the model's own
    output projection follows. Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, but without a
    norm on h, which has been through the model's last one.

    Args:
        hidden_size: E.
        attention: called with (B, S, E), position embeddings and options, to (B, S, E) (or a tuple
            that begins with it).
        mlp: from (B, S, E) to (B, S, E).
        norm_eps: epsilon of the four norms.
        device: where the other parameters are made.
        dtype: their dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        attention: nn.Module,
        mlp: nn.Module,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_norm = RMSNorm(hidden_size, eps=norm_eps, **made)
        self.input_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False, **made)
        self.input_layernorm = RMSNorm(hidden_size, eps=norm_eps, **made)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, eps=norm_eps, **made)
        self.mlp = mlp
        self.final_layernorm = RMSNorm(hidden_size, eps=norm_eps, **made)

    def forward(
        self,
        hidden_states: Tensor,
        next_embeddings: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """(B, S, E) and (B, S, E) -> (B, S, E).

        Args:
            hidden_states: of the model, after its last norm.
            next_embeddings: of the tokens one to the right, as the model embeds them.
            position_embeddings: cosines and sines of hidden_states' positions.
            options: for the attention.

        Raises:
            ValueError: shapes that differ.
        """
        if hidden_states.shape != next_embeddings.shape:
            raise ValueError(
                f"next_embeddings has shape {tuple(next_embeddings.shape)} and hidden_states "
                f"{tuple(hidden_states.shape)}; they must be equal: an embedding of the next token for each"
            )
        hidden = self.input_proj(torch.cat((hidden_states, self.embed_norm(next_embeddings)), dim=-1))
        attended = self.self_attn(self.input_layernorm(hidden), position_embeddings, **options)
        hidden = hidden + (attended[0] if isinstance(attended, tuple) else attended)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return self.final_layernorm(hidden)  # type: ignore[no-any-return]
