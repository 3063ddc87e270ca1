"""Speculative decoding: a model's own layer for multi-token prediction drafts the token after the
next one, and the model's next pass tells whether it would have taken it.

Sources: Leviathan et al., arXiv 2211.17192; DeepSeek-V3, arXiv 2412.19437, section 5.4.3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from motifarch.models.motif import MotifForCausalLM
from motifarch.models.motif.rotary import mtp_layer_type


@dataclass
class SpeculativeDecoding:
    """Decoding for ``model.generate(ids, custom_generate=SpeculativeDecoding())``, of one row.

    Each pass of the model takes its last token and a draft of the next one. The model's own next
    token is chosen as without a draft; where the draft is that token, the same pass has the token
    after it. So the tokens are those of plain decoding, greedy or drawn, but for rounding, which a
    pass of two tokens may do otherwise than one of one.

    That a drawn token is compared with the draft is rejection sampling from a draft of one token
    of probability 1: it is accepted with the model's probability of it, and otherwise the token is
    drawn from what the model gives the others.

    Attributes:
        streamer: is given each new token. ``generate`` does not hand its own to such a callable;
            give it there too for the prompt.
        drafted: tokens that the model was asked about, in all calls.
        accepted: those that it would have taken.
    """

    streamer: BaseStreamer | None = None
    drafted: int = 0
    accepted: int = 0

    @property
    def accepted_share(self) -> float | None:
        """The share of drafts that was accepted; None before the first."""
        return self.accepted / self.drafted if self.drafted else None

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Tensor], Tensor],
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continues input_ids (1, S); ``generate`` calls it with what it prepares.

        Returns:
            (1, S + new), or with ``return_dict_in_generate`` that as ``sequences``, and
            ``past_key_values``.

        Raises:
            ValueError: a model without a layer for multi-token prediction, more than one row, or a
                cache that cannot forget a token.
        """
        streamer = self.streamer if streamer is None else streamer
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        check(model, input_ids, generation_config, cache, mask)
        assert isinstance(model, MotifForCausalLM)
        assert cache is not None
        seen = cache.get_seq_length()
        draft_layer = Draft(model, seen)
        # Of one row, padding can be left out.
        pending = (input_ids if mask is None else input_ids[mask.bool()][None])[:, seen:].to(model.device)
        draft = pending[:, :0]
        while True:
            new = torch.cat((pending, draft), dim=1)
            hidden_states = model.model(input_ids=new, past_key_values=cache, use_cache=True).last_hidden_state
            last = pending.shape[1] - 1
            for place, logits in enumerate(model.lm_head(hidden_states[:, last:]).unbind(dim=1), last):
                scores = logits_processor(input_ids, logits.to(torch.float32))
                token = scores.argmax(-1, keepdim=True)
                if generation_config.do_sample:
                    token = torch.multinomial(scores.softmax(-1), 1)
                input_ids = torch.cat((input_ids, token.to(input_ids.device)), dim=1)
                if streamer is not None:
                    streamer.put(token[0].cpu())
                stopped = bool(stopping_criteria(input_ids, scores).all())
                known = place + 1
                if stopped or known == new.shape[1] or token != new[:, known:]:
                    break
            if draft.shape[1]:
                self.drafted += 1
                self.accepted += known - pending.shape[1]
                cache.crop(known - new.shape[1])
            if stopped:
                break
            # From now on a window's layers keep what a pass drops, until crop.
            cache.activate_past_recording()
            following = torch.cat((new[:, 1:known], token), dim=1)
            draft, pending = draft_layer(hidden_states[:, :known], following), token
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)  # type: ignore[arg-type]
        return input_ids


class Draft:
    """The likeliest token after the next one, by a model's layer for multi-token prediction.

    Args:
        model: with such a layer.
        start: position of the first token that it is called with.
    """

    def __init__(self, model: MotifForCausalLM, start: int = 0) -> None:
        config = model.config
        self._model, self._seen = model, start
        self._kind = mtp_layer_type(config)
        left, _ = config.window_of(self._kind)
        own = DynamicLayer() if left < 0 else DynamicSlidingWindowLayer(left + 1)
        # The layer's place in a cache is after the model's layers, which leave theirs empty here.
        self._cache = Cache(layers=[*(DynamicLayer() for _ in range(config.num_hidden_layers)), own])

    def __call__(self, hidden_states: Tensor, following: Tensor) -> Tensor:
        """(1, 1): the draft, after the model's last hidden states (1, S, E) and the tokens (1, S)
        to the right of each. What it is called with is remembered.
        """
        model = self._model.model
        positions = torch.arange(self._seen, self._seen + following.shape[1], device=following.device)[None]
        self._seen += following.shape[1]
        predicted = model.mtp_layers[0](
            hidden_states,
            model.embed_tokens(following),
            model.rotary_embs[self._kind](positions, hidden_states.dtype),
            past_key_values=self._cache,
        )
        logits: Tensor = self._model.lm_head(predicted[:, -1])
        return logits.argmax(-1, keepdim=True)


def check(
    model: PreTrainedModel, input_ids: Tensor, wanted: GenerationConfig, cache: Cache | None, mask: Tensor | None
) -> None:
    """Raise ValueError for what speculative decoding does not serve."""
    if not has_draft(model):
        raise ValueError(
            f"{type(model).__name__} has no layer for multi-token prediction (num_nextn_predict_layers in its "
            "config.json), which drafts; decode without speculation"
        )
    if tuple(input_ids.shape) != (1, max(1, input_ids.shape[1])):
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; speculative decoding continues one row of tokens: call it "
            "for each, without beams, and without inputs_embeds"
        )
    if cache is None or cache.is_compileable:
        kind = "no cache" if cache is None else f"a {type(cache).__name__}"
        raise ValueError(f"{kind}, from which no token can be taken back; give a DynamicCache, or use_cache=True alone")
    if mask is not None and cache.get_seq_length():
        raise ValueError("there is padding in a cache that holds tokens; give past_key_values without padding, or none")
    outputs = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if names := [name for name in outputs if getattr(wanted, name, None)]:
        raise ValueError(f"speculative decoding has no {' and '.join(names)}; leave them out")


def has_draft(model: PreTrainedModel) -> bool:
    """Whether a model has a layer for multi-token prediction."""
    return isinstance(model, MotifForCausalLM) and len(model.model.mtp_layers) > 0
