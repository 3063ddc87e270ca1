"""The Motif language model, as transformers knows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from motifarch.decoder_layers import decoder_layers
from motifarch.layers import IGNORE_INDEX, linear_cross_entropy
from motifarch.layers.cross_entropy import next_labels
from motifarch.models.motif import tensor_parallel as tensor_parallel  # makes its style known to transformers
from motifarch.models.motif.base_model import OURS, MotifModel, MotifPreTrainedModel, has_restarts
from motifarch.models.motif.caches import (
    left_only,
    padding_on_the_left,
    visible_places,
)
from motifarch.models.motif.configuration_motif import MotifConfig


@dataclass
class MotifCausalLMOutput(CausalLMOutputWithPast):
    """transformers' output and what ``loss`` has besides the mean cross-entropy: detached float32
    scalars, already multiplied by their weights; None where there are none.
    """

    z_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    expert_loss: Tensor | None = None
    """Balance and magnitude losses of the routed experts."""
    mtp_logits: Tensor | None = None
    """(B, S, words), of the token after the next one; in the last position they mean nothing."""


class MotifForCausalLM(MotifPreTrainedModel, GenerationMixin):
    """A Motif model with its language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MotifConfig) -> None:
        super().__init__(config)
        self.model = MotifModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MotifForCausalLM":
        # to_empty gives each name a tensor of its own and so unties them.
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        num_items_in_batch: Tensor | int | None = None,
        z_loss_weight: float = 0.0,
        mtp_loss_weight: float = 0.2,
        return_logits: bool | None = None,
        return_mtp_logits: bool = False,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        cache_leftpad: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MotifCausalLMOutput:
        """Logits, or the loss of given labels (in float32 and in chunks, never holding all logits
        for it).

        Packed documents are given by ``cu_seq_lens_q`` and ``max_length_q``, or by position_ids
        that restart at each document.

        Args:
            input_ids: (B, S).
            attention_mask: (B, cached + S), 0 for padding; or (B, 1 or heads, S, keys) of what each
                token sees, in place of causality and window: booleans, or floats that are added to
                the logits (with a static cache, keys are all its places).
            position_ids: (B, S) or (1, S); default: counted on from the cache.
            past_key_values: a transformers Cache.
            inputs_embeds: (B, S, E) instead of input_ids.
            labels: (B, S) ids aligned with input_ids, -100 for none; shifted here, and never across
                packed documents or out of padding.
            use_cache: make and return a cache; default: the config's value, and never in training.
            logits_to_keep: logits of that many last tokens only (0: all), or of these indices.
            num_items_in_batch: divides the summed loss instead of the number of targets in this
                call.
            z_loss_weight: weight of the mean squared log-sum-exp, added to the loss.
            mtp_loss_weight: in training mode, weight of the cross-entropy of the token after the
                next one, summed over its targets and divided as the loss is (DeepSeek-V3, arXiv
                2412.19437, equation 24); 0.2 in Motif-3.
            return_logits: None gives logits unless there is a loss in training mode or shift_labels
                were given.
            return_mtp_logits: give mtp_logits too.
            cu_seq_lens_q: (documents + 1,) int32 bounds of packed documents in the B * S tokens.
            max_length_q: the longest packed document.
            cache_leftpad: (B,) int32, padding at the start of each row of a cache that holds
                tokens: an attention_mask of one size for all lengths.
            output_attentions: return each layer's softmax probabilities (B, num_heads, S, keys) of
                signal and noise heads as q_proj has them, computed as with "eager".
            **kwargs: shift_labels, (B, S) the target of each position, which win over labels;
                mtp_labels, (B, S) that of multi-token prediction, and next_input_ids, of a row that
                is part of a longer one (see MotifModel);
                output_hidden_states, every layer's input (of streams (B, S, streams, E) with
                hyper-connections) and the final hidden states (or those of some indices);
                return_dict; and transformers' other arguments (cu_seq_lens_k and max_length_k are
                those of q).

        Returns:
            loss, logits, past_key_values, hidden_states, attentions and z_loss.

        Raises:
            ValueError: what MotifModel raises.
        """
        # Not in the signature: Trainer takes every such argument for one that a batch must have.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        mtp_labels: Tensor | None = kwargs.pop("mtp_labels", None)
        with_mtp_loss = self.training and mtp_loss_weight > 0 and not (labels is None and shift_labels is None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
            cache_leftpad=cache_leftpad,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_mtp=with_mtp_loss or return_mtp_logits,
            **(kwargs | {"return_dict": True}),
        )
        hidden_states = outputs.last_hidden_state
        if return_logits is None:
            return_logits = shift_labels is None and not (labels is not None and self.training)
        # Trainer's context parallelism and DeepSpeed's sequence parallelism give both, shifted.
        if labels is not None and shift_labels is None:
            shift_labels = self._shift(labels, position_ids, cu_seq_lens_q, attention_mask)

        loss = z_loss = mtp_loss = expert_loss = logits = None
        if return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if shift_labels is not None:
            # The loss is that of the logits: of these, where they are all there (a head's dropout
            # is then the same in both), and otherwise of the head, called for a chunk at a time.
            states, head = hidden_states, self.lm_head
            if logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0:
                states, head = logits, nn.Identity()
            loss, z_loss, _ = linear_cross_entropy(
                states,
                head,
                shift_labels.to(hidden_states.device),
                num_items=num_items_in_batch,
                z_loss_weight=z_loss_weight,
            )
            is_target = shift_labels != IGNORE_INDEX
            num_items = is_target.sum() if num_items_in_batch is None else num_items_in_batch
            if with_mtp_loss and outputs.mtp_hidden_states is not None:
                if mtp_labels is None:
                    mtp_labels = self._shift(shift_labels, position_ids, cu_seq_lens_q, attention_mask)
                mtp_loss, _, _ = linear_cross_entropy(
                    outputs.mtp_hidden_states, self.lm_head, mtp_labels.to(hidden_states.device), num_items=num_items
                )
                mtp_loss = mtp_loss * mtp_loss_weight
                loss, mtp_loss = loss + mtp_loss, mtp_loss.detach()
            if outputs.expert_losses is not None:
                # By a sequence's share of the targets, so that parts of a global batch add up.
                of_token = outputs.expert_losses.sum(dim=-1)
                expert_loss = (of_token * is_target.to(of_token)).sum() / num_items
                loss, expert_loss = loss + expert_loss, expert_loss.detach()
        mtp_logits = None
        if return_mtp_logits and outputs.mtp_hidden_states is not None:
            mtp_logits = self.lm_head(outputs.mtp_hidden_states)
        return MotifCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            z_loss=z_loss,
            mtp_loss=mtp_loss,
            expert_loss=expert_loss,
            mtp_logits=mtp_logits,
        )

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> Any:
        """As transformers does; where the attention is ours to choose, it is "sdpa".

        Raises:
            ValueError: latent attention, whose cache continuous batching does not have.
        """
        if self.config.is_latent:
            raise ValueError(
                f"continuous batching does not serve attention_type {self.config.attention_type!r}: its cache keeps "
                "heads' keys and values, not latents; use generate()"
            )
        if self.config._attn_implementation in OURS:
            self.set_attn_implementation("sdpa")
        mixin: Any = super()
        return mixin.init_continuous_batching(*arguments, **options)

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """For the mask over a static cache: none of B x S x capacity is made."""
        return attention_mask

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of a generation step, as transformers prepares them; arguments are its own.

        With a static cache the mask, which grows with each token, becomes the padding that it
        begins with, or where there is other padding what each place is: all tensors of a decoding
        step keep their shapes, and a compiled model is compiled once.
        """
        mixin: Any = super()  # it types its self as a protocol that this class is not
        inputs: dict[str, Any] = mixin.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        mask = inputs.get("attention_mask")
        if past_key_values is None or not past_key_values.is_compileable or is_first_iteration or self._uses_interface:
            return inputs
        if mask is None or mask.ndim != 2:
            return inputs
        if left_only(mask):
            inputs |= {"cache_leftpad": padding_on_the_left(mask), "attention_mask": None}
        else:
            new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            inputs["attention_mask"] = {
                kind: visible_places(
                    mask,
                    new.shape[1],
                    past_key_values,
                    self.config.window_of(kind),
                    self.config.layer_types.index(kind),
                )
                for kind in set(self.config.layer_types)
            }
        return inputs

    @staticmethod
    def _shift(
        labels: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Each position's next label, but none for padding and a row's or document's last."""
        shifted = next_labels(labels, cu_seqlens)
        if cu_seqlens is None and attention_mask is None and has_restarts(position_ids):
            shifted[:, :-1].masked_fill_(position_ids.diff() != 1, IGNORE_INDEX)
        if (
            attention_mask is not None and attention_mask.ndim == 2
        ):  # the padding before a row's first token does not predict it
            shifted.masked_fill_(attention_mask[:, -shifted.shape[1] :] == 0, IGNORE_INDEX)
        return shifted

    def last_lambdas(self) -> Tensor | None:
        """Each layer's mean lambda in the last pass, (layers,) float32; None for softmax."""
        values = [layer.self_attn.last_lambda for layer in self.model.layers]
        return None if any(v is None for v in values) else torch.stack(values).float()

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one token's forward and backward pass, without
        recomputation, in documents (or rows, if documents are longer) of ``seq_len`` tokens.

        Matrix products only: six for each weight of a linear layer that a token meets (its own
        experts', the output projection's for each token that is predicted; the embedding's lookup
        not), and causal attention at half of the full map: ``2 (D + Dv)`` for each head and visible
        pair forward, twice that backward.
        """
        config = self.config
        # Not the weight's own size: a quantised one is packed, and a sharded one may be away.
        weights = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))
        weights += config.num_nextn_predict_layers * config.hidden_size * config.vocab_size
        if config.num_experts:
            assert config.experts_top_k is not None
            assert config.moe_intermediate_size is not None
            expert = 3 * config.hidden_size * config.moe_intermediate_size
            weights += len(self.model.expert_layers()) * config.experts_top_k * expert
        layers: list[Any] = decoder_layers(self)
        attention = sum(layer.self_attn.attention_flops(seq_len) for layer in layers)
        return 6.0 * weights + 3.0 * attention / seq_len
