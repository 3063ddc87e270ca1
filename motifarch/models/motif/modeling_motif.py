"""The Motif models: motifarch.layers inside, transformers' conventions outside."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from motif_kernels.impl.flash import libraries as flash
from motif_kernels.ops import is_exporting
from motifarch.forward_arguments import check_arguments
from motifarch.layers import (
    IGNORE_INDEX,
    CachePosition,
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    PolyNorm,
    PolyNormMLP,
    RMSNorm,
    SoftmaxAttention,
    SwiGLUMLP,
    cu_seqlens_from_position_ids,
    default_lambda_init,
    linear_cross_entropy,
)
from motifarch.layers.base_attention import BaseAttention
from motifarch.models.motif import tensor_parallel as tensor_parallel  # makes its style known to transformers
from motifarch.models.motif.attention_interface import (
    InterfaceAttention,
    is_registered,
    is_served,
    positions_in_documents,
)
from motifarch.models.motif.caches import (
    AttentionMask,
    left_only,
    padding_on_the_left,
    read_attention_mask,
    seen_tokens,
    visible_documents,
    visible_places,
)
from motifarch.models.motif.configuration_motif import MotifConfig
from motifarch.models.motif.loading import WholeOrNothing
from motifarch.models.motif.rotary import build_rotary

# attn_implementation -> motif_kernels' backend. "auto", the default, "triton" and "cpu" are ours;
# the rest are transformers' names. Any "flash_..." is whichever flash-attn is installed. Others go
# through transformers' attention interface, and so do these under continuous batching.
_OURS = ("auto", "triton", "cpu")
_BACKENDS = {**{name: name for name in _OURS}, "eager": "reference", "sdpa": "sdpa"}
_FLASH = "flash_"


def build_attention(config: MotifConfig, layer_idx: int) -> nn.Module:
    """The attention layer that ``config.attention_type`` names."""
    common: dict[str, Any] = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "layer_idx": layer_idx,
        "qk_norm": config.qk_norm,
        "qk_norm_eps": config.rms_norm_eps,
        "window_size": config.window_size,
        "bias": config.use_bias,
    }
    if config.attention_type == "softmax":
        return SoftmaxAttention(config.hidden_size, **common)
    differential: dict[str, Any] = {"num_noise_heads": config.noise_heads, "norm_eps": config.attn_rms_norm_eps}
    if config.attention_type == "diff_v2":
        return DifferentialAttentionV2(
            config.hidden_size, **common, **differential, gate=config.attention_gate, sub_norm=bool(config.sub_norm)
        )
    return GroupedDifferentialAttention(
        config.hidden_size,
        **common,
        **differential,
        paired_kv=config.has_paired_kv,
        sub_norm=config.sub_norm is not False,
        lambda_init=lambda_init_of(config, layer_idx),
    )


def lambda_init_of(config: MotifConfig, layer_idx: int) -> float:
    """The constant in a layer's lambda, with "gda" and "diff_v1"."""
    if config.lambda_init is not None:
        return float(config.lambda_init)
    offset = config.lambda_init_depth_offset
    if offset is None:
        offset = -1 if config.attention_type == "gda" else 0
    return default_lambda_init(layer_idx + offset)


def _restarts(position_ids: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a row of position_ids (B or 1, S) holds packed documents."""
    return position_ids is not None and bool((position_ids.diff() != 1).any())


class MotifDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward block, each added to the residual stream."""

    def __init__(self, config: MotifConfig, layer_idx: int) -> None:
        super().__init__()
        attention: Any = build_attention(config, layer_idx)
        # What functions of transformers' attention interface read of a module.
        attention.config, attention.is_causal = config, True
        kv_width = attention.num_kv_heads * attention.head_dim
        attention.num_key_value_groups = attention.num_heads * attention.v_head_dim // kv_width
        self.self_attn: nn.Module = attention
        size, width, bias = config.hidden_size, config.intermediate_size, config.use_bias
        if config.hidden_act == "poly_norm":
            self.mlp: nn.Module = PolyNormMLP(size, intermediate_size=width, eps=config.poly_norm_eps, bias=bias)
        else:
            self.mlp = SwiGLUMLP(size, intermediate_size=width, bias=bias)
        self.input_layernorm = RMSNorm(size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        """hidden_states (B, S, E) -> (B, S, E); options are those of ``BaseAttention.forward``."""
        attended = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, **options)
        if isinstance(attended, tuple):  # with the maps, which transformers takes from the layer itself
            attended = attended[0]
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MotifPreTrainedModel(WholeOrNothing, PreTrainedModel):
    """What transformers needs to know of every Motif model."""

    config_class = MotifConfig
    config: MotifConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MotifDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MotifDecoderLayer, "attentions": BaseAttention}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Trainer's label smoothing shifts labels for the class names in this table alone, and would
        # have other models repeat their input. Subclasses count too: FSDP2 makes some.
        if issubclass(cls, GenerationMixin):
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.__name__] = cls.__name__

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *arguments: Any, **options: Any
    ) -> str:
        """What transformers asks for a name's meaning: ours besides its own."""
        name = "auto" if attn_implementation is None else attn_implementation
        if name.startswith(_FLASH):
            if flash.installed() is None:
                raise ValueError(f"attn_implementation {name!r}: no flash-attn is installed; install it or take 'auto'")
            return name
        if name in _OURS:
            return name
        return super()._check_and_adjust_attn_implementation(name, *arguments, **options)

    def set_attn_implementation(self, *arguments: Any, **options: Any) -> None:
        """As transformers does; the layers follow."""
        super().set_attn_implementation(*arguments, **options)
        self._set_backend()

    def _set_backend(self) -> None:
        """Gives all attention layers the backend that the config's attn_implementation means."""
        name = self.config._attn_implementation
        if not (name.startswith(_FLASH) or name in _BACKENDS or is_registered(name)):
            raise ValueError(
                f"attn_implementation {name!r} is not supported; choose one of {', '.join(_BACKENDS)}, "
                "flash_attention_2, or one that is registered in transformers' AttentionInterface"
            )
        for module in self.modules():
            if isinstance(module, BaseAttention):
                module.backend = _BACKENDS.get(name, "flash" if name.startswith(_FLASH) else "auto")

    @property
    def _uses_interface(self) -> bool:
        """Whether attention is one of transformers' interface and not motif_kernels'."""
        name = self.config._attn_implementation
        return name not in _BACKENDS and not name.startswith(_FLASH)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, GroupedDifferentialAttention):
            for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(vector, mean=0.0, std=0.1)


class MotifModel(MotifPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    # The folder of a model with a head serves the model inside it.
    _keys_to_ignore_on_load_unexpected = [r"^(lm_head|score|qa_outputs)\.(weight|bias)$"]

    def __init__(self, config: MotifConfig) -> None:
        config.validate_architecture()  # fields may have been set after it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MotifDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._set_backend()
        self.rotary_emb = build_rotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        cache_leftpad: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch, of packed documents, or of new tokens after a cache.

        Arguments are those of :meth:`MotifForCausalLM.forward`.

        Returns:
            last_hidden_state (B, S, E), past_key_values, hidden_states, attentions.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, an attention_mask of another
                shape, a mask together with packed documents, or more tokens than a static cache has
                room for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seqlen = hidden_states.shape[:2]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        served = is_served(kwargs)
        if not served:
            check_arguments(kwargs, cu_seq_lens_q, max_length_q)
        may_restart = cu_seq_lens_q is None and attention_mask is None and past_key_values is None
        if may_restart and position_ids is not None and is_exporting():
            attention_mask = visible_documents(position_ids, self.config.window_size)
        elif may_restart and _restarts(position_ids):
            cu_seq_lens_q, max_length_q = cu_seqlens_from_position_ids(position_ids.expand(batch, seqlen))
        if use_cache and past_key_values is None and cu_seq_lens_q is None:
            past_key_values = DynamicCache(config=self.config)
        seen = seen_tokens(past_key_values, seqlen)
        if position_ids is None:
            position_ids = (torch.arange(seqlen, device=hidden_states.device) + seen)[None]
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)
        mask, attend = AttentionMask(leftpad=cache_leftpad), None
        if served or self._uses_interface:
            if output_attentions or cache_leftpad is not None:
                raise ValueError(
                    f"output_attentions and cache_leftpad work with attn_implementation {', '.join(_BACKENDS)}, not "
                    f"through transformers' attention interface ({self.config._attn_implementation!r}); leave them out"
                )
            kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q} if served else {}
            if cu_seq_lens_q is not None and not served:
                position_ids = positions_in_documents(cu_seq_lens_q, batch, seqlen)
            attend = InterfaceAttention(
                self.config, hidden_states, attention_mask, position_ids, past_key_values, kwargs
            )
            attention_mask = cu_seq_lens_q = max_length_q = None
        if attention_mask is not None:
            window = self.config.window_size
            mask = read_attention_mask(attention_mask, batch, seqlen, seen, past_key_values, window)
        cache_position = None
        if past_key_values is not None and attend is None:
            cache_position = CachePosition(seen, batch, seqlen, leftpad=mask.leftpad, device=hidden_states.device)
        if cu_seq_lens_q is not None and not (mask.padding is None and mask.visible is None):
            raise ValueError(
                "cu_seq_lens_q and an attention_mask with padding were both given; packed documents hold no padding: "
                "leave one of the two out"
            )

        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings,
                cu_seqlens=cu_seq_lens_q,
                max_seqlen=max_length_q,
                past_key_values=past_key_values,
                padding=mask.padding,
                cache_position=cache_position,
                attn_mask=mask.visible,
                output_attentions=output_attentions,
                attend=attend,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


@dataclass
class MotifCausalLMOutput(CausalLMOutputWithPast):
    """transformers' output and ``loss``'s z-loss (detached float32; None without labels)."""

    z_loss: Tensor | None = None


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
        return_logits: bool | None = None,
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
            return_logits: None gives logits unless there is a loss in training mode or shift_labels
                were given.
            cu_seq_lens_q: (documents + 1,) int32 bounds of packed documents in the B * S tokens.
            max_length_q: the longest packed document.
            cache_leftpad: (B,) int32, padding at the start of each row of a cache that holds
                tokens: an attention_mask of one size for all lengths.
            output_attentions: return each layer's softmax probabilities (B, num_heads, S, keys) of
                signal and noise heads as q_proj has them, computed as with "eager".
            **kwargs: shift_labels, (B, S) the target of each position, which win over labels;
                output_hidden_states, every layer's input and the final hidden states (or those of
                some indices); return_dict; and transformers' other arguments (cu_seq_lens_k and
                max_length_k are those of q).

        Returns:
            loss, logits, past_key_values, hidden_states, attentions and z_loss.

        Raises:
            ValueError: what MotifModel raises.
        """
        # Not in the signature: Trainer takes every such argument for one that a batch must have.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
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
            **(kwargs | {"return_dict": True}),
        )
        hidden_states = outputs.last_hidden_state
        if return_logits is None:
            return_logits = shift_labels is None and not (labels is not None and self.training)
        # Trainer's context parallelism and DeepSpeed's sequence parallelism give both, shifted.
        if labels is not None and shift_labels is None:
            shift_labels = self._shift(labels, position_ids, cu_seq_lens_q, attention_mask)

        loss = z_loss = logits = None
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
        return MotifCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            z_loss=z_loss,
        )

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> Any:
        """As transformers does; where the attention is ours to choose, it is "sdpa"."""
        if self.config._attn_implementation in _OURS:
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
            inputs["attention_mask"] = visible_places(mask, new.shape[1], past_key_values, self.config.window_size)
        return inputs

    @staticmethod
    def _shift(
        labels: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Each position's next token, but none for padding and a row's or document's last."""
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if cu_seqlens is not None:
            last = cu_seqlens[1:].long() - 1
            shifted.view(-1)[last[last >= 0]] = IGNORE_INDEX
        elif attention_mask is None and _restarts(position_ids):
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

        Matrix products only: six for each weight of a linear layer (the output projection included,
        the embedding's lookup not), and causal attention at half of the full map: ``2 (D + Dv)``
        for each head and visible pair forward, twice that backward.
        """
        config = self.config
        # Not the weight's own size: a quantised one is packed, and a sharded one may be away.
        weights = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))
        pairs = (seq_len + 1) / 2
        if config.use_sliding_window and config.sliding_window is not None and config.sliding_window < seq_len:
            w = config.sliding_window
            pairs = w - w * (w - 1) / (2 * seq_len)
        assert config.head_dim is not None  # filled in by the config
        heads = config.num_attention_heads * 2 * (config.head_dim + config.v_head_dim)
        return 6.0 * weights + 3.0 * config.num_hidden_layers * heads * pairs
