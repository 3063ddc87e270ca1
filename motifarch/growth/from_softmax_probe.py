"""How far an approximate conversion is from its softmax model, and the gains that bring it closest:
both by running it.

A layer at a time, so that neither model has to fit in memory.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from motifarch.errors import UserError, first_line
from motifarch.growth.compare import Described, logits
from motifarch.growth.folders import SourceFolder
from motifarch.growth.from_softmax import Kind, from_softmax
from motifarch.growth.from_softmax_sources import as_motif
from motifarch.growth.model_spec import ModelSpec
from motifarch.models.motif import MotifConfig

ROWS, TOKENS = 4, 256
"""Rows of the probe, and the most tokens of a row."""


def probe_ids(source: SourceFolder, text: Path | None = None, seed: int = 0) -> Tensor:
    """Token ids (rows, tokens) to run both models on: a text file's first, by the source's own
    tokenizer, or random ones, which no model is trained on.

    Raises:
        UserError: the text can't be read or is too short, or the folder has no tokenizer.
    """
    longest = min(TOKENS, source.config.get("max_position_embeddings", TOKENS))
    if text is None:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(source.shape("model.embed_tokens.weight")[0], (ROWS, longest), generator=draw)
    try:
        ids = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)(text.read_text(encoding="utf-8"))[
            "input_ids"
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{text} can't be made into tokens of {source.path}: {first_line(error)}") from None
    length = min(longest, len(ids) // ROWS)
    if length < 2:
        raise UserError(f"{text} has {len(ids)} tokens; give a text of at least {2 * ROWS}")
    return torch.tensor(ids[: ROWS * length]).view(ROWS, length)


def closest(
    source: SourceFolder, spec: ModelSpec, to: Kind, ids: Tensor, *, sub_norm: bool = False, **options: Any
) -> ModelSpec:
    """A conversion that may be inexact, as close as it comes on ids (rows, tokens); its last step's
    loss, if any, says by how much logits moved.

    Behind a sub-norm each head's output is multiplied by one number, the one that brings it closest
    to the softmax model's in the mean square over the probe: a norm takes every token's own size
    away, and this gives back the usual one.

    Raises:
        UserError: what :func:`from_softmax` raises, whose options these are.
    """
    options |= {"sub_norm": sub_norm, "approximate": True}
    found = from_softmax(spec, to, **options)
    if found.steps[-1].loss is None:
        return found
    gains = _Gains(MotifConfig.from_dict(found.config), shrink=1.0 if to == "gda" else 0.5)
    before = logits(
        Described(as_motif(spec), source), ids, before_layer=gains.watch if sub_norm else lambda layer: None
    )
    if sub_norm:
        found = from_softmax(spec, to, **options, gains=torch.stack(gains.measured))
    after = logits(Described(found, source), ids)
    moved = (after - before).abs().mean().item()
    changed = (after.argmax(-1) != before.argmax(-1)).float().mean().item()
    loss = (
        f"{found.steps[-1].loss}; on a probe of {ids.numel()} tokens logits move by {moved:.3g} on average, where the "
        f"source's have a standard deviation of {before.std().item():.3g}, and the likeliest token changes at "
        f"{changed:.1%} of positions"
    )
    step = dataclasses.replace(found.steps[-1], loss=loss)
    return dataclasses.replace(found, steps=(*found.steps[:-1], step))


class _Gains:
    """Each head's best multiple of its normalised output; a sub-norm sees ``shrink`` of a head."""

    def __init__(self, config: MotifConfig, shrink: float) -> None:
        assert config.v_head_dim is not None  # filled in by the config
        self.width, self.eps, self.shrink = config.v_head_dim, config.attn_rms_norm_eps, shrink
        self.measured: list[Tensor] = []
        """(heads,) for each layer that has run."""

    def watch(self, layer: nn.Module) -> None:
        """Measures a layer when it runs."""
        layer.get_submodule("self_attn.o_proj").register_forward_pre_hook(self._measure)

    def _measure(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads = inputs[0].unflatten(-1, (-1, self.width)).flatten(0, 1)  # (tokens, heads, D)
        normalised = torch.nn.functional.rms_norm(self.shrink * heads, (self.width,), eps=self.eps)
        squares = normalised.square().sum((0, 2)).clamp(min=torch.finfo(heads.dtype).tiny)
        self.measured.append((heads * normalised).sum((0, 2)) / squares)
