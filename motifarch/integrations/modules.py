"""Which modules of a transformers model are patched, whether they can be, and patching them."""

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from motifarch.counted import counted
from motifarch.integrations.attention import IMPLEMENTATION
from motifarch.integrations.configuration import PATCH, PatchOptions
from motifarch.integrations.derived import linear_of
from motifarch.integrations.families import FAMILIES, PLAIN, Forward
from motifarch.integrations.feed_forward import gate_and_up, with_poly_norm
from motifarch.integrations.latent import replace_latents
from motifarch.integrations.layouts import (
    attention_layout,
    feed_forward_layout,
    head_counts,
    head_dim,
    is_experts,
    is_unknown_attention,
    output_name,
)
from motifarch.integrations.noise_heads import add_noise_heads, differential_module
from motifarch.integrations.parts import other_parts, part_configs, patched_part
from motifarch.integrations.probe import kind_of, probe
from motifarch.integrations.report import ModuleReport

Forwards = Mapping[str, Forward]
"""By the attention modules' class names."""


def rebuild(model: Any) -> None:
    """Patches a model that was just built, as its config says, before loading."""
    record = getattr(model.config, PATCH)
    options = PatchOptions(**{k: v for k, v in record.items() if k in PatchOptions.__dataclass_fields__})
    modules = find_modules(model, options)
    kv_heads = check_attention(modules["attention"], options.ratio, merge_kv=True)
    forwards = {name: Forward(**values) for name, values in record.get("forwards", {}).items()}
    patch_modules(model, modules, options, kv_heads, forwards or known_forwards(record["host"], modules), "auto")


def find_modules(model: nn.Module, options: PatchOptions) -> dict[str, dict[str, Any]]:
    """The modules to patch, by what they are and by name."""
    found: dict[str, dict[str, Any]] = {"attention": {}, "feed_forward": {}, "experts": {}}
    prefix, part = patched_part(model)
    for name, module in part.named_modules(prefix=prefix):
        if options.attention and attention_layout(module):
            found["attention"][name] = module
        elif options.attention and is_unknown_attention(module) and not isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose projections ({_linear_names(module)}) are none that can "
                "be patched; attention=None patches feed-forward blocks alone"
            )
        if options.feed_forward and is_experts(module):
            found["experts"][name] = module
        elif options.feed_forward and feed_forward_layout(module):
            found["feed_forward"][name] = module
    if options.attention and not found["attention"]:
        raise ValueError(f"{type(model).__name__} has no attention that can be patched")
    for modules in found.values():
        for name, module in modules.items():
            if "forward" in vars(module):
                raise ValueError(
                    f"the forward of {name} was replaced (by accelerate's hooks, or a kernel), so that a patch would "
                    "have no effect; patch the model before it is dispatched"
                )
    for name, module in found["attention"].items():
        if getattr(module, "config", None) is not part.config:
            raise ValueError(f"{name} has another config than the {type(part).__name__} that it is in")
    return found


def _linear_names(module: nn.Module) -> str:
    return ", ".join(name for name, child in module.named_children() if isinstance(child, nn.Linear))


def check_attention(modules: dict[str, Any], ratio: int, *, merge_kv: bool) -> dict[str, tuple[int, int]]:
    """Key/value heads of each module, before and after; changes nothing.

    Raises:
        ValueError: something that a patched module could not honour, or a ratio that does not fit.
    """
    result = {}
    for name, module in modules.items():
        layout, output = attention_layout(module), output_name(module)
        assert layout is not None
        for projection in (*layout.projections, *([output] if output else [])):
            kind = type(getattr(module, projection))
            if kind is not nn.Linear:
                raise ValueError(f"{name}.{projection} is a {kind.__name__}; only a plain nn.Linear can be patched")
            weight = getattr(module, projection).weight
            if type(weight) is not nn.Parameter:
                raise ValueError(
                    f"{name}.{projection}.weight is a {type(weight).__name__} (sharded or quantized); patch the model "
                    "first, then shard or quantize it"
                )
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if own:
            raise ValueError(f"{name}, a {type(module).__name__}, attends with {', '.join(own)}, which is not served")
        dropout = _dropout(module)
        if dropout:
            raise ValueError(
                f"{name} has attention dropout {dropout}, which differential attention does not; set "
                "config.attention_dropout (or attention_probs_dropout_prob) to 0 before the model is built"
            )
        heads, held = head_counts(module)
        if layout.latent:
            if module.qk_rope_head_dim > module.v_head_dim:
                raise ValueError(
                    f"{name} rotates {module.qk_rope_head_dim} numbers of a head, more than its values' "
                    f"{module.v_head_dim}, which would be the new heads' width"
                )
            _fitting_kv_heads(name, heads, 1, ratio, merge_kv=False)
            result[name] = (heads // ratio, heads // ratio)  # new ones: as many as there are noise heads
            continue
        result[name] = (held, _fitting_kv_heads(name, heads, held, ratio, merge_kv=merge_kv))
    return result


def _dropout(module: Any) -> float:
    dropout = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    return float(getattr(dropout, "p", dropout))


def check_forwards(model: Any, modules: dict[str, Any], kv_heads: dict[str, tuple[int, int]]) -> Forwards:
    """How the attention modules' forwards go: their kinds are run, patched and not, and must be the
    same function; on the meta device, that of a family known for it.

    Raises:
        ValueError: naming a module that would be another function.
    """
    if any(p.is_meta for p in model.parameters()):
        return known_forwards(model.config.model_type, {"attention": modules})
    # A doubled difference that starts at lambda 1/2 is the same function, whose noise heads count.
    options = PatchOptions("diff_v2", 1, None, sub_norm=False, lambda_init=0.0, experts=None)

    def patched(name: str, module: Any, forward: Forward) -> Any:
        return _differential(name, module, forward, options, kv_heads[name], "auto")[0]

    whole = {name: module for name, module in modules.items() if not _is_latent(module)}
    plain = dict.fromkeys({type(module).__name__ for module in modules.values()}, PLAIN)
    return plain | probe(model, whole, lambda name, module: _mean_heads(module, *kv_heads[name]), patched)


def known_forwards(host: str, modules: dict[str, dict[str, Any]]) -> Forwards:
    """Those of a family that is known.

    Raises:
        ValueError: it is not.
    """
    if host not in FAMILIES:
        raise ValueError(
            f"nothing can be run on the meta device, and models of type {host!r} are patched only where it shows that "
            f"they stay the same function; there, {', '.join(FAMILIES)} can be patched"
        )
    return {type(module).__name__: FAMILIES[host] for module in modules["attention"].values()}


def _is_latent(module: Any) -> bool:
    layout = attention_layout(module)
    return layout is not None and layout.latent


def _fitting_kv_heads(name: str, heads: int, kv_heads: int, ratio: int, *, merge_kv: bool) -> int:
    """Key/value heads that the ratio's noise heads are a multiple of."""
    divisors = [r for r in range(1, heads + 1) if heads % r == 0]
    fitting = ", ".join(str(r) for r in divisors if (heads // r) % kv_heads == 0)
    if heads % ratio:
        raise ValueError(f"ratio={ratio} does not divide the {heads} query heads of {name}; {fitting} would fit")
    noise_heads = heads // ratio
    if noise_heads % kv_heads == 0:
        return kv_heads
    merged = math.gcd(noise_heads, kv_heads)
    if not merge_kv:
        raise ValueError(
            f"ratio={ratio} gives {name} {noise_heads} noise heads for {heads} query heads, not a multiple of its "
            f"{kv_heads} key/value heads; ratio={fitting.replace(', ', ' or ')} would fit, or merge_kv=True, which "
            f"makes {counted(merged, 'key/value head')} of them (not the same function)"
        )
    return merged


def check_feed_forward(model: Any, modules: dict[str, dict[str, Any]], options: PatchOptions) -> None:
    """Raise ValueError for feed-forward modules that cannot be swapped."""
    if modules["experts"] and options.experts is None:
        first, *others = modules["experts"]
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"feed_forward={options.feed_forward!r}: the model has routed experts ({first}{more}); say "
            "experts='keep' to leave theirs and swap the dense and shared blocks alone, or experts='swap' to give them "
            "one PolyNorm a layer"
        )
    for name, module in modules["experts"].items() if options.experts == "swap" else ():
        if not isinstance(getattr(module, "act_fn", None), nn.Module):
            raise ValueError(f"{name}, a {type(module).__name__}, has no act_fn; experts='keep' leaves it as it is")
    if options.feed_forward and not modules["feed_forward"] and options.experts != "swap":
        besides = "; experts='keep' leaves nothing" if modules["experts"] else ""
        raise ValueError(
            f"{type(model).__name__} has no feed-forward block that can be patched (besides routed experts){besides}"
        )
    if any(p.is_meta for p in model.parameters()):
        return
    for name, module in {kind_of(module): (name, module) for name, module in modules["feed_forward"].items()}.values():
        _check_gated(name, module)


def _check_gated(name: str, module: Any) -> None:
    """Raise ValueError unless a gated feed-forward is the formula that it is taken for."""
    layout = feed_forward_layout(module)
    assert layout is not None
    weights = [getattr(module, n).weight for n in layout.inputs]
    if not layout.gated or any(type(weight) is not nn.Parameter for weight in weights):
        return  # nothing is taken for granted, or what is quantized cannot be run so
    twin = copy.deepcopy(module).to("cpu", torch.float64).eval()
    x = torch.randn(3, weights[0].shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        gate, up = gate_and_up(twin, layout, x)
        expected = getattr(twin, layout.output)(getattr(twin, layout.activation)(gate) * up)
        if not torch.allclose(twin(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())):
            raise ValueError(
                f"{name} ({type(module).__name__}) is not {layout.output}({layout.activation}(gate) * up) of its "
                f"{', '.join(layout.inputs)}; its activation cannot be swapped"
            )


def patch_modules(
    model: Any,
    modules: dict[str, dict[str, Any]],
    options: PatchOptions,
    kv_heads: dict[str, tuple[int, int]],
    forwards: Forwards,
    backend: str,
) -> list[ModuleReport]:
    """Put patched modules in the place of the host's, which were checked; returns what was done."""
    reports = []
    for name, module in modules["attention"].items():
        forward = forwards[type(module).__name__]
        patched, report = _differential(name, module, forward, options, kv_heads[name], backend)
        model.set_submodule(name, patched)
        reports.append(report)
    if modules["attention"]:
        for config in part_configs(model):
            # Whisper's is another name for the number of all heads.
            if hasattr(config, "num_key_value_heads") and "num_key_value_heads" not in config.attribute_map:
                config.num_key_value_heads = next(iter(kv_heads.values()))[1]
            config._attn_implementation = IMPLEMENTATION
        others = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
        reports += [ModuleReport(name, "as it was", ["all (torch's own attention)"]) for name in others]
    reports += [ModuleReport(name, "as it was", ["all (not the language model)"]) for name in other_parts(model)]
    for name, module in modules["feed_forward"].items():
        layout = feed_forward_layout(module)
        assert layout is not None
        swapped = with_poly_norm(module, layout)
        model.set_submodule(name, swapped)
        reports.append(_swapped(name, module, layout.activation, [*layout.inputs, layout.output]))
    for name, module in modules["experts"].items():
        if options.experts == "swap":
            model.set_submodule(name, with_poly_norm(module, None))
            reports.append(_swapped(name, module, "act_fn", ["gate_up_proj", "down_proj"]))
        else:
            reports.append(ModuleReport(name, "as it was", ["all (routed experts)"]))
    return reports


def _swapped(name: str, module: Any, activation: str, kept: list[str]) -> ModuleReport:
    lost = [f"{type(getattr(module, activation)).__name__} activation"]
    added = [f"{activation}.weight", f"{activation}.bias"]
    return ModuleReport(name, "PolyNorm", kept, added, lost=lost, exact=False)


def _differential(
    name: str, module: Any, forward: Forward, options: PatchOptions, kv_heads: tuple[int, int], backend: str
) -> tuple[Any, ModuleReport]:
    (heads, _), (before, after) = head_counts(module), kv_heads
    layout = attention_layout(module)
    assert layout is not None
    held = dict(module.named_parameters())
    patched = differential_module(module, forward)
    merged, lost, split = "", [], []
    if layout.latent:
        lost = replace_latents(patched, kv_heads=after)
    elif before != after:
        _merge(patched, layout.split[1:], before, after, heads)
        merged = f"{before} key/value heads merged to {after} (means)"
    if layout.fused:
        split = [f"{layout.projections[0]} (as {' and '.join(layout.split)})"]
    query, *others = layout.split
    add_noise_heads(patched, options, heads, query=query, norm_heads_dim=forward.norm_heads_dim, backend=backend)
    now = dict(patched.named_parameters())
    own = {id(p) for p in held.values()}
    kept = ["scale", *split]
    if getattr(module, "sliding_window", None):
        kept.append(f"window of {module.sliding_window}")
    if "position_embeddings" in inspect.signature(module.forward).parameters:
        kept.append("rotary")
    from_fused = tuple(f"{other}." for other in others) if layout.fused else ()
    exact = options.attention_is_exact and not merged and not layout.latent
    grown = [n for n in now if n.startswith(f"{query}.") and not layout.latent]
    added = [n for n, p in now.items() if id(p) not in own and n not in {*held, *grown}]
    what = f"{options.attention}: {heads} signal, {heads // options.ratio} noise, {after} key/value heads"
    return patched, ModuleReport(
        name,
        what,
        kept=kept + [n for n, p in now.items() if id(p) in own or n.startswith(from_fused)],
        added=[n for n in added if not n.startswith(from_fused)],
        grown=grown,
        lost=lost,
        merged=merged,
        exact=exact,
    )


def _merge(module: Any, names: tuple[str, ...], before: int, after: int, heads: int) -> None:
    """Replace each run of before / after neighbouring key/value heads by its mean."""

    def mean(tensor: Tensor) -> Tensor:
        # (after, run, D, ...) -> (after * D, ...)
        return tensor.detach().unflatten(0, (after, before // after, -1)).mean(dim=1).flatten(0, 1).to(tensor.dtype)

    for name in names:
        setattr(module, name, linear_of(getattr(module, name), mean))
    module.num_key_value_groups = heads // after
    for name in ("num_key_value_heads", "num_heads"):  # the number by which hosts cut keys and values into heads
        if hasattr(module, name):
            setattr(module, name, after)


def _mean_heads(module: Any, before: int, after: int) -> None:
    """Make each run of before / after neighbouring key/value heads alike: a host that is the same
    function as one whose heads are merged.
    """
    layout = attention_layout(module)
    if before == after or layout is None:
        return

    def alike(tensor: Tensor) -> Tensor:
        runs = tensor.detach().unflatten(0, (after, before // after, -1))
        return runs.mean(dim=1, keepdim=True).expand_as(runs).flatten(0, 2)

    def fused(tensor: Tensor) -> Tensor:
        width = head_dim(module) * before
        query, key, value = tensor.detach().split([len(tensor) - 2 * width, width, width])
        return torch.cat((query, alike(key), alike(value)))

    for name in layout.projections[-2:]:
        setattr(module, name, linear_of(getattr(module, name), fused if layout.fused else alike))
