"""Whether a patched attention module computes what its host does: both run on what the model gives
them, in float64.

The model runs once, on a few random tokens (an image, a sound), as far as its first attention
module of each kind. There this implementation stands in for the model's own, and is eager
attention; its masks say both what eager attention and what patched attention is to hide.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import PreTrainedModel

from motifarch.integrations.attention import IMPLEMENTATION
from motifarch.integrations.derived import beside
from motifarch.integrations.families import Forward
from motifarch.integrations.layouts import head_counts
from motifarch.integrations.masks import visible_keys

PROBED = "motifarch_probed"
"""The ``config._attn_implementation`` of a model that is run here."""

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _Masks:
    """The same mask, as eager attention and as patched attention take it."""

    eager: Any
    patched: Any


class _Call(NamedTuple):
    """How a model called one of its modules."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Enough(Exception):
    """Every kind of module was called."""


def _both_masks(*arguments: Any, **options: Any) -> _Masks:
    return _Masks(eager_mask(*arguments, **options), visible_keys(*arguments, **options))


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    handed: list[bool] | None = None,
    **options: Any,
) -> Any:
    """Eager attention of the module's family; says in ``handed`` that it arrived here."""
    if handed is not None:
        handed.append(True)
    mask = attention_mask.eager if isinstance(attention_mask, _Masks) else attention_mask
    return beside(module, "eager_attention_forward")(module, query, key, value, mask, **options)


AttentionInterface.register(PROBED, _eager)
AttentionMaskInterface.register(PROBED, _both_masks)


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that differ in their weights and places alone."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, int | float | str | None) and n != "layer_idx"}
    return type(module), repr(module), tuple(sorted(plain.items(), key=lambda item: item[0]))


def probe(
    model: PreTrainedModel,
    modules: dict[str, Any],
    prepare: Callable[[str, Any], None],
    patched: Callable[[str, Any, Forward], Any],
) -> dict[str, Forward]:
    """Run one attention module of each kind, and what patching makes of it.

    Args:
        model: the host; it is as it was afterwards.
        modules: its attention modules, by name.
        prepare: called with a module's name and a copy of it, in float64 on the CPU, before it
            runs.
        patched: makes a patched module that must compute the same, of the name, the copy and how
            its forward goes.

    Returns:
        How the forward of each class of modules goes.

    Raises:
        ValueError: naming a module that cannot be run, or that would be another function.
    """
    if not modules:
        return {}
    kinds = {kind_of(module): name for name, module in reversed(modules.items())}
    forwards = {}
    for name, call in _calls(model, {name: modules[name] for name in kinds.values()}).items():
        twin = copy.deepcopy(modules[name]).to("cpu", torch.float64).eval()  # its config is copied, too
        try:
            prepare(name, twin)
            twin.config._attn_implementation = PROBED
            expected, forward = _run_host(twin, call)
            changed = patched(name, twin, forward)
            twin.config._attn_implementation = IMPLEMENTATION
            with torch.no_grad():
                out = _first(changed(*_given(call.arguments, "patched"), **_given(call.options, "patched")))
        except Exception as error:
            raise ValueError(f"{name} ({type(modules[name]).__name__}) cannot be patched: {error}") from error
        moved = float((out - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not moved <= _TOLERANCE:
            raise ValueError(
                f"{name} ({type(modules[name]).__name__}) would be another function: patched, with a lambda that "
                f"should change nothing, its output differs by {moved:.1e} of its largest number; its forward does "
                "more than project, normalise, rotate and attend"
            )
        forwards[type(modules[name]).__name__] = forward
    return forwards


def _calls(model: Any, modules: dict[str, Any]) -> dict[str, _Call]:
    """How the model calls these modules."""
    calls: dict[str, _Call] = {}

    def note(name: str) -> Any:
        def hook(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls.setdefault(name, _Call(arguments, options))
            if len(calls) == len(modules):
                raise _Enough

        return hook

    configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    implementations = [config._attn_implementation for config in configs]
    training = [module for module in model.modules() if module.training]
    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        inputs = _inputs(model, {n for module in modules.values() for n in head_counts(module)})
        for config in configs:
            config._attn_implementation = PROBED
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(**inputs)
    except _Enough:
        return calls
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be run on random inputs, to see what its attention does: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
        for config, implementation in zip(configs, implementations, strict=True):
            config._attn_implementation = implementation
    missing = ", ".join(name for name in modules if name not in calls)
    raise ValueError(f"{missing} was not called when {type(model).__name__} was run, so that nothing is known of it")


def _inputs(model: Any, heads: set[int]) -> dict[str, Any]:
    """Two rows of a few random tokens, or two images or sounds of noise."""
    config, name = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(0)
    place = {"device": model.device}
    tokens = next(n for n in range(7, 7 + len(heads) + 1) if n not in heads)  # the two are told from each other
    options: dict[str, Any] = {"use_cache": False} if hasattr(config, "use_cache") else {}
    if name == "input_ids":
        shape: tuple[int, ...] = (2, tokens)
        # Ids that stand for images and the like are left out.
        marks = [v for n, v in vars(config).items() if n.endswith("token_id") and isinstance(v, int)]
        ids = torch.arange(model.get_input_embeddings().num_embeddings)
        ids = ids[~torch.isin(ids, torch.tensor(marks, dtype=ids.dtype))]
        options[name] = ids[torch.randint(len(ids), shape, generator=generator)].to(**place)
    else:
        if name == "pixel_values":
            size = config.image_size
            shape = (2, config.num_channels, *(size if isinstance(size, tuple | list) else (size, size)))
        elif name == "input_features":
            shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
        else:
            raise ValueError(f"its main input is {name}; input_ids, pixel_values and input_features are known")
        options[name] = torch.randn(shape, generator=generator).to(dtype=model.dtype, **place)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        options["decoder_input_ids"] = torch.randint(config.vocab_size, (2, tokens), generator=generator).to(**place)
    return options


def _run_host(twin: Any, call: _Call) -> tuple[Tensor, Forward]:
    """A host's module on what it was given: what it gives, and how its forward goes."""
    heads = head_counts(twin)[0]
    handed: list[bool] = []
    shapes: list[tuple[int, ...]] = []
    options = _given(call.options, "eager")
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(twin.forward).parameters.values()):
        options["handed"] = handed
    norm = getattr(twin, "q_norm", None)
    hook = norm and norm.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    with torch.no_grad():
        expected = _first(twin(*_given(call.arguments, "eager"), **options))
    if hook is None:
        return expected, Forward(hands_on=bool(handed))
    hook.remove()
    (shape,) = shapes
    norm_heads_dim = -1 if len(shape) == 3 else next((d for d in (1, 2) if shape[d] == heads), None)
    if norm_heads_dim is None:
        raise ValueError(f"its q_norm takes {shape}, in which the {heads} heads are not counted")
    return expected, Forward(norm_heads_dim, bool(handed))


def _given(value: Any, masks: str) -> Any:
    """Arguments of a call in float64 on the CPU, with masks of one kind and without a cache."""
    if isinstance(value, _Masks):
        return _given(getattr(value, masks), masks)
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64) if value.is_floating_point() else value.cpu()
    if isinstance(value, tuple | list):
        return tuple(_given(v, masks) for v in value)
    if isinstance(value, dict):
        return {n: None if n == "past_key_values" else _given(v, masks) for n, v in value.items()}
    return value


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
