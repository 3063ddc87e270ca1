"""`patch`: differential attention and PolyNorm in a transformers model that exists."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from motif_kernels.dispatch import BACKENDS
from motifarch.integrations.attention import IMPLEMENTATION
from motifarch.integrations.configuration import PATCH
from motifarch.integrations.families import FAMILIES, Family
from motifarch.integrations.feed_forward import swap_activation, swap_experts_activation
from motifarch.integrations.latent import LOST, GroupedQueryAttention, replace_latents
from motifarch.integrations.noise_heads import add_noise_heads
from motifarch.integrations.report import ModuleReport, PatchReport
from motifarch.integrations.saving import PatchedModelMixin, mark

_CHOICES: dict[str, tuple[Any, ...]] = {
    "attention": ("gda", "diff_v2", None),
    "feed_forward": ("polynorm", None),
    "experts": ("keep", "swap", None),
    "backend": tuple(BACKENDS),
}


@dataclass(frozen=True)
class _Options:
    attention: str | None
    ratio: int
    feed_forward: str | None
    sub_norm: bool
    lambda_init: float
    experts: str | None

    @property
    def attention_is_exact(self) -> bool:
        """Whether attention starts as what it was."""
        if self.attention == "gda":
            return not self.sub_norm and self.lambda_init == 0.0
        return not self.sub_norm and self.ratio == 1


def patch(
    model: PreTrainedModel,
    attention: str | None = "gda",
    ratio: int = 4,
    feed_forward: str | None = None,
    *,
    sub_norm: bool = False,
    lambda_init: float = 0.0,
    merge_kv: bool = False,
    experts: str | None = None,
    backend: str = "auto",
) -> PatchReport:
    """Swap attention, feed-forward blocks or both of a transformers model, in place.

    Attention keeps its H query heads as signal heads, its output projection, norms, scale, window,
    softcap and rotary embeddings, layer by layer, and gains H / ratio noise heads over the same
    keys and values: the cache is what it was. With the defaults the model starts as the same
    function: lambda starts at 0, and the noise heads' queries as those of each group's first signal
    head. (At lambda 0 these get no gradient; they do from the second step on.) With ``"diff_v2"``
    lambda starts at 1/2 and the difference is doubled: the same function for ratio 1, not
    otherwise.

    Args:
        model: of a family in :data:`motifarch.integrations.families.FAMILIES`; on any device, the
            meta device too.
        attention: "gda" (one lambda a layer, arXiv 2510.06949), "diff_v2" (a lambda for each token
            and head), or None to leave attention alone.
        ratio: signal heads a noise head. It divides H, and H / ratio must be a multiple of the
            key/value heads.
        feed_forward: "polynorm" puts PolyNorm (arXiv 2411.03884) in the place of the gated
            feed-forward's activation, which is another function to begin with; None leaves it.
        sub_norm: RMS-normalise each head's difference, which cannot start as the same function.
        lambda_init: GDA's constant, and its lambda's start.
        merge_kv: where the ratio does not fit, take means of neighbouring key/value heads until it
            does.
        experts: with "polynorm" and routed experts: "keep" theirs (dense and shared ones are
            swapped), or "swap" their activation too, one PolyNorm a layer; None refuses such a
            model.
        backend: motif_kernels' backend.

    Returns:
        What was kept, added and lost, module by module; print it.

    Raises:
        TypeError: model is no transformers model.
        ValueError: a family, module, option or ratio that does not fit; the model is as it was.
    """
    given = {"attention": attention, "feed_forward": feed_forward, "experts": experts, "backend": backend}
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, _CHOICES[name]))}")
    if attention is None and feed_forward is None:
        raise ValueError("attention and feed_forward are both None: nothing to patch")
    if attention == "diff_v2" and lambda_init:
        raise ValueError(f"lambda_init is {lambda_init}, but lambda of 'diff_v2' has no constant; leave it 0")
    if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
        raise ValueError(f"ratio is {ratio!r}; it must be a whole number of signal heads a noise head, 1 or more")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no transformers model; give what from_pretrained returns")
    if isinstance(model, PatchedModelMixin):
        raise ValueError("the model is patched already; patch a fresh one, with all options at once")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantized; load it without quantization, patch it, then quantize")
    host = model.config.model_type
    if host not in FAMILIES:
        raise ValueError(f"models of type {host!r} cannot be patched; those of {', '.join(FAMILIES)} can")
    options = _Options(attention, ratio, feed_forward, sub_norm, float(lambda_init), experts)
    modules = _find(model, FAMILIES[host], options)
    kv_heads = _check_attention(modules["attention"], FAMILIES[host], ratio, merge_kv=merge_kv)
    _check_feed_forward(modules, options)
    reports = _apply(model, FAMILIES[host], modules, options, kv_heads, backend)
    mark(model, {"host": host, **asdict(options)})
    done = [f"attention {attention} {ratio}:1"] if attention else []
    done += ["feed-forward polynorm"] if feed_forward else []
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return PatchReport(f"{host}: {', '.join(done)}", sorted(reports, key=lambda r: order[r.name]))


def rebuild(model: Any) -> None:
    """Patch a model that was just built, as its config says: what is loaded into it was patched
    before it was saved.
    """
    record = {k: v for k, v in getattr(model.config, PATCH).items() if k in _Options.__dataclass_fields__}
    options, family = _Options(**record), FAMILIES[getattr(model.config, PATCH)["host"]]
    modules = _find(model, family, options)
    kv_heads = _check_attention(modules["attention"], family, options.ratio, merge_kv=False)
    _apply(model, family, modules, options, kv_heads, "auto")


def _find(model: nn.Module, family: Family, options: _Options) -> dict[str, dict[str, Any]]:
    """The modules to patch, by what they are and by name."""
    wanted = {
        "attention": family.attention if options.attention else None,
        "feed_forward": family.feed_forward if options.feed_forward else None,
        "experts": family.experts if options.feed_forward else None,
    }
    found: dict[str, dict[str, Any]] = {kind: {} for kind in wanted}
    for name, module in model.named_modules():
        for kind, class_name in wanted.items():
            if type(module).__name__ == class_name:
                found[kind][name] = module
    if options.attention and not found["attention"]:
        raise ValueError(f"{type(model).__name__} has no {family.attention}; transformers may have changed it")
    for modules in found.values():
        for name, module in modules.items():
            if "forward" in vars(module):
                raise ValueError(
                    f"the forward of {name} was replaced (by accelerate's hooks, or a kernel), so that a patch would "
                    "have no effect; patch the model before it is dispatched"
                )
    return found


def _query_heads(module: Any, family: Family) -> int:
    """H."""
    return int(module.num_heads if family.latent else module.q_proj.out_features // module.head_dim)


def _check_attention(
    modules: dict[str, Any], family: Family, ratio: int, *, merge_kv: bool
) -> dict[str, tuple[int, int]]:
    """Key/value heads of each module, before and after; changes nothing.

    Raises:
        ValueError: something that a patched module could not honour, or a ratio that does not fit.
    """
    result = {}
    for name, module in modules.items():
        for projection in ("o_proj",) if family.latent else ("q_proj", "k_proj", "v_proj", "o_proj"):
            kind = type(getattr(module, projection, None))
            if kind is not nn.Linear:
                raise ValueError(f"{name}.{projection} is a {kind.__name__}; only a plain nn.Linear can be patched")
        if getattr(module, "attention_dropout", 0.0):
            raise ValueError(
                f"{name} has attention dropout {module.attention_dropout}, which differential attention does not; "
                "set config.attention_dropout to 0 before the model is built"
            )
        if not module.is_causal or not getattr(module.config, "is_causal", True):
            raise ValueError(f"{name} is not causal (bidirectional attention), which a patched module cannot be")
        heads = _query_heads(module, family)
        if family.latent:
            if module.qk_rope_head_dim > module.v_head_dim:
                raise ValueError(
                    f"{name} rotates {module.qk_rope_head_dim} numbers of a head, more than its values' "
                    f"{module.v_head_dim}, which would be the new heads' width"
                )
            _fitting_kv_heads(name, heads, 1, ratio, merge_kv=False)
            result[name] = (heads // ratio, heads // ratio)  # new ones: as many as there are noise heads
            continue
        held = module.k_proj.out_features // module.head_dim
        result[name] = (held, _fitting_kv_heads(name, heads, held, ratio, merge_kv=merge_kv))
    return result


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
            f"makes {merged} key/value head{'s' if merged > 1 else ''} of them (not the same function)"
        )
    return merged


def _check_feed_forward(modules: dict[str, dict[str, Any]], options: _Options) -> None:
    """Raise ValueError for feed-forward modules that cannot be swapped."""
    for name, module in modules["feed_forward"].items():
        missing = [p for p in ("gate_proj", "up_proj", "down_proj", "act_fn") if not hasattr(module, p)]
        if missing:
            raise ValueError(f"{name} has no {', '.join(missing)}; its activation cannot be swapped")
    if modules["experts"] and options.experts is None:
        first, *others = modules["experts"]
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"feed_forward={options.feed_forward!r}: the model has routed experts ({first}{more}); say "
            "experts='keep' to leave theirs and swap the dense and shared blocks alone, or experts='swap' to give them "
            "one PolyNorm a layer"
        )
    if options.feed_forward and not modules["feed_forward"] and options.experts != "swap":
        raise ValueError(
            "the model has no feed-forward block besides its routed experts: experts='keep' leaves nothing"
        )


def _apply(
    model: Any,
    family: Family,
    modules: dict[str, dict[str, Any]],
    options: _Options,
    kv_heads: dict[str, tuple[int, int]],
    backend: str,
) -> list[ModuleReport]:
    """Patch the modules, which were checked; returns what was done."""
    reports = []
    for name, module in modules["attention"].items():
        reports.append(_patch_attention(name, module, family, options, kv_heads[name], backend))
    if modules["attention"]:
        model.config.num_key_value_heads = next(iter(kv_heads.values()))[1]
        model.config._attn_implementation = IMPLEMENTATION
    for name, module in modules["feed_forward"].items():
        reports.append(_swapped(name, module, swap_activation, ["gate_proj", "up_proj", "down_proj"]))
    for name, module in modules["experts"].items():
        if options.experts == "swap":
            reports.append(_swapped(name, module, swap_experts_activation, ["gate_up_proj", "down_proj"]))
        else:
            reports.append(ModuleReport(name, "as it was", ["all (routed experts)"]))
    return reports


def _swapped(name: str, module: Any, swap: Any, kept: list[str]) -> ModuleReport:
    lost = f"{type(module.act_fn).__name__} activation"
    swap(module)
    return ModuleReport(name, "PolyNorm", kept, ["act_fn.weight", "act_fn.bias"], [lost], exact=False)


def _patch_attention(
    name: str, module: Any, family: Family, options: _Options, kv_heads: tuple[int, int], backend: str
) -> ModuleReport:
    heads, (before, after) = _query_heads(module, family), kv_heads
    names_before = {n for n, _ in module.named_parameters()}
    merged = ""
    if family.latent:
        replace_latents(module, kv_heads=after)
    elif before != after:
        _merge(module, before, after, heads)
        merged = f"{before} key/value heads merged to {after} (means)"
    assert options.attention is not None
    add_noise_heads(
        module,
        signal_heads=heads,
        noise_heads=heads // options.ratio,
        head_dim=module.head_dim,
        attention=options.attention,
        sub_norm=options.sub_norm,
        lambda_init=options.lambda_init,
        norm_heads_dim=family.norm_heads_dim,
        backend=backend,
        base=GroupedQueryAttention if family.latent else None,
    )
    names = [n for n, _ in module.named_parameters()]
    kept = ["scale", "window", "rotary"] if not family.latent else ["scale"]
    kept += [n for n in names if n in names_before and not (merged and n.startswith(("k_proj", "v_proj")))]
    exact = options.attention_is_exact and not merged and not family.latent
    added = [n for n in names if n not in names_before]
    lost = [n for n in LOST if family.latent]
    what = f"{options.attention}: {heads} signal, {heads // options.ratio} noise, {after} key/value heads"
    return ModuleReport(name, what, kept, added, lost, merged, exact)


def _merge(module: Any, before: int, after: int, heads: int) -> None:
    """Replace each run of before / after neighbouring key/value heads by its mean."""
    for projection in (module.k_proj, module.v_proj):
        for name, tensor in list(projection.named_parameters()):
            # (after, run, D, ...) -> (after * D, ...)
            mean = tensor.detach().unflatten(0, (after, before // after, -1)).mean(dim=1).flatten(0, 1)
            setattr(projection, name, nn.Parameter(mean.to(tensor.dtype), requires_grad=tensor.requires_grad))
        projection.out_features = projection.weight.shape[0]
    module.num_key_value_groups = heads // after
    if hasattr(module, "num_key_value_heads"):
        module.num_key_value_heads = after
