"""The Motif models without a head: motifarch.layers inside, transformers' conventions outside."""

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.output_capturing import capture_outputs

from motif_kernels.impl.flash import libraries as flash
from motif_kernels.ops import is_exporting
from motifarch.field_types import is_import_path
from motifarch.forward_arguments import check_arguments
from motifarch.layers import (
    CachePosition,
    GroupedDifferentialAttention,
    HyperConnections,
    MixtureOfExperts,
    PolyNorm,
    RMSNorm,
    cu_seqlens_from_position_ids,
    expand_streams,
    merge_streams,
)
from motifarch.layers.base_attention import BaseAttention
from motifarch.layers.experts import Experts
from motifarch.layers.hyper_connections import XavierLinear
from motifarch.layers.poly_norm import GroupedPolyNorm
from motifarch.models.motif import tensor_parallel as tensor_parallel  # makes its style known to transformers
from motifarch.models.motif.attention_interface import (
    InterfaceAttention,
    is_registered,
    is_served,
    positions_in_documents,
)
from motifarch.models.motif.caches import (
    AttentionMask,
    fit_windows,
    read_attention_mask,
    seen_tokens,
    visible_documents,
)
from motifarch.models.motif.configuration_motif import MotifConfig
from motifarch.models.motif.decoder_layer import MotifDecoderLayer, build_mtp
from motifarch.models.motif.loading import WholeOrNothing
from motifarch.models.motif.own_attention import default_implementation
from motifarch.models.motif.rotary import build_rotaries, mtp_layer_type

# attn_implementation -> motif_kernels' backend. "auto", the default, "triton" and "cpu" are ours;
# the rest are transformers' names. Any "flash_..." is whichever flash-attn is installed. Others go
# through transformers' attention interface, and so do these under continuous batching.
OURS = ("auto", "triton", "cpu")
_BACKENDS = {**{name: name for name in OURS}, "eager": "reference", "sdpa": "sdpa"}
_FLASH = "flash_"


def has_restarts(position_ids: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a row of position_ids (B or 1, S) holds packed documents."""
    return position_ids is not None and bool((position_ids.diff() != 1).any())


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
        name = (
            default_implementation(self.config.attention_type) if attn_implementation is None else attn_implementation
        )
        if name.startswith(_FLASH):
            if flash.installed() is None:
                raise ValueError(f"attn_implementation {name!r}: no flash-attn is installed; install it or take 'auto'")
            return name
        if name in OURS or is_import_path(name):
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
        if self.config.is_latent and self._uses_interface:
            raise ValueError(
                f"attn_implementation {name!r} does not serve attention_type {self.config.attention_type!r}; "
                f"choose one of {', '.join(_BACKENDS)}"
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
        if isinstance(module, XavierLinear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, PolyNorm | GroupedPolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MixtureOfExperts):
            init.zeros_(module.expert_bias)
            init.zeros_(module.tokens_per_expert)
            init.zeros_(module.statistic_sums)
            module.reset_statistics()
        elif isinstance(module, HyperConnections):
            self._init_hyper_connections(module)
        elif isinstance(module, GroupedDifferentialAttention):
            for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(vector, mean=0.0, std=0.1)

    @staticmethod
    def _init_hyper_connections(module: HyperConnections) -> None:
        """The identity, with post_alpha 1, or small random maps (Motif-3); the projections are
        linear layers.
        """
        streams = len(module.bias_pre)
        scales: list[Any] = [module.alpha_pre, module.alpha_post, module.alpha_res]
        init.zeros_(module.bias_post)
        if module.identity_init:
            for scale in scales:
                init.zeros_(scale)
            init.constant_(module.bias_pre, -math.log(streams - 1))  # sigmoid gives 1 / streams
            init.copy_(module.bias_res, torch.eye(streams, device=module.bias_res.device) * 10 - 10)
            return
        for drawn in (*scales, module.bias_res):
            init.normal_(drawn, mean=0.0, std=0.1)
        init.zeros_(module.bias_pre)


@dataclass
class MotifModelOutput(BaseModelOutputWithPast):
    """transformers' output, and what training needs."""

    mtp_hidden_states: Tensor | None = None
    """(B, S, E) from which the head predicts the token after the next one."""
    expert_losses: Tensor | None = None
    """Balance and magnitude losses of each token's sequence, (B, S, 2) float32, summed over layers;
    in training mode of a model with experts.
    """


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
        self.mtp_layers = nn.ModuleList(build_mtp(config) for _ in range(config.num_nextn_predict_layers))
        self._set_backend()
        self.rotary_embs = build_rotaries(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        cache_leftpad: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_mtp: bool = False,
        next_input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MotifModelOutput:
        """Hidden states of a batch, of packed documents, or of new tokens after a cache.

        Arguments are those of :meth:`MotifForCausalLM.forward`, and output_mtp: whether
        mtp_hidden_states are given too; with them next_input_ids, (B, 1 or 0), are the tokens after
        the last of each row, where rows go on elsewhere, and position_ids restart where documents
        do.

        Returns:
            last_hidden_state (B, S, E), past_key_values, hidden_states, attentions,
            mtp_hidden_states and expert_losses.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, an attention_mask of another
                shape, a mask together with packed documents, or more tokens than a static cache has
                room for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_mtp = output_mtp and len(self.mtp_layers) > 0
        if input_ids is not None and next_input_ids is not None and output_mtp:
            # One look-up, whose gradient is one matrix.
            embeddings = self.embed_tokens(torch.cat((input_ids, next_input_ids), dim=1))
            hidden_states = embeddings[:, : input_ids.shape[1]]
        else:
            hidden_states = embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
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
            attention_mask = {
                kind: visible_documents(position_ids, self.config.window_of(kind)) for kind in self.rotary_embs
            }
        elif may_restart and has_restarts(position_ids):
            cu_seq_lens_q, max_length_q = cu_seqlens_from_position_ids(position_ids.expand(batch, seqlen))
        if use_cache and past_key_values is None and cu_seq_lens_q is None:
            past_key_values = DynamicCache(config=self.config)
        packed = cu_seq_lens_q
        fit_windows(past_key_values, self.config)
        seen = seen_tokens(past_key_values, seqlen)
        if position_ids is None:
            position_ids = (torch.arange(seqlen, device=hidden_states.device) + seen)[None]
        position_embeddings = {
            kind: rotary(position_ids, hidden_states.dtype) for kind, rotary in self.rotary_embs.items()
        }
        masks = dict.fromkeys(position_embeddings, AttentionMask(leftpad=cache_leftpad))
        attend = None
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
            masks = {
                kind: read_attention_mask(
                    attention_mask[kind] if isinstance(attention_mask, dict) else attention_mask,
                    batch,
                    seqlen,
                    seen,
                    past_key_values,
                    self.config.window_of(kind),
                    self._first_layer(kind),
                )
                for kind in masks
            }
        mask = next(iter(masks.values()))
        cache_position = None
        if past_key_values is not None and attend is None:
            cache_position = CachePosition(seen, batch, seqlen, leftpad=mask.leftpad, device=hidden_states.device)
        if cu_seq_lens_q is not None and not (mask.padding is None and mask.visible is None):
            raise ValueError(
                "cu_seq_lens_q and an attention_mask with padding were both given; packed documents hold no padding: "
                "leave one of the two out"
            )
        options = {
            kind: {
                "position_embeddings": position_embeddings[kind],
                "cu_seqlens": cu_seq_lens_q,
                "max_seqlen": max_length_q,
                "padding": mask.padding,
                "attn_mask": mask.visible,
            }
            for kind, mask in masks.items()
        }

        losses = []
        if self.config.mhc_enabled:
            hidden_states = expand_streams(hidden_states, self.config.mhc_expansion_rate)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                **options[str(layer.layer_type)],
                past_key_values=past_key_values,
                cache_position=cache_position,
                output_attentions=output_attentions,
                attend=attend,
            )
            if isinstance(hidden_states, tuple):
                hidden_states, of_experts = hidden_states
                losses.append(of_experts)
        if self.config.mhc_enabled:
            hidden_states = merge_streams(hidden_states)
        hidden_states = self.norm(hidden_states)
        predicted = None
        if output_mtp:
            # What follows a row's last one is not known, unless it was given; a document's neither,
            # so that packed documents do not depend on what they lie beside.
            following = nn.functional.pad(embeddings, (0, 0, 0, seqlen + 1 - embeddings.shape[1]))[:, 1:]
            if packed is not None:
                places = position_ids if next_input_ids is not None else positions_in_documents(packed, batch, seqlen)
                begins = nn.functional.pad(places[:, 1:] == 0, (0, 1))
                following = following.masked_fill(begins[..., None], 0.0)
            predicted = self.mtp_layers[0](hidden_states, following, **options[mtp_layer_type(self.config)])
        return MotifModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            mtp_hidden_states=predicted,
            expert_losses=torch.stack(losses).sum(dim=0) if losses else None,
        )

    def _first_layer(self, kind: str) -> int:
        """A layer of a type, by its index; 0 where only multi-token prediction has it."""
        types = self.config.layer_types
        return types.index(kind) if kind in types else 0

    def expert_layers(self) -> dict[int, MixtureOfExperts]:
        """The layers with routed experts, by their index."""
        return {i: layer.moe for i, layer in enumerate(self.layers) if isinstance(layer.moe, MixtureOfExperts)}
