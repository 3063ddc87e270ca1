"""Which modules of a transformers model are patched, whether they can be, and patching them."""

import math
from typing import Any

from torch import Tensor, nn

from motifarch.integrations.attention import IMPLEMENTATION
from motifarch.integrations.configuration import PATCH, PatchOptions
from motifarch.integrations.families import FAMILIES, Family
from motifarch.integrations.feed_forward import with_poly_norm
from motifarch.integrations.latent import LOST, replace_latents
from motifarch.integrations.noise_heads import add_noise_heads, differential_module, linear_of
from motifarch.integrations.report import ModuleReport


def rebuild(model: Any) -> None:
    """Patches a model that was just built, as its config says, before loading."""
    record = {k: v for k, v in getattr(model.config, PATCH).items() if k in PatchOptions.__dataclass_fields__}
    options, family = PatchOptions(**record), FAMILIES[getattr(model.config, PATCH)["host"]]
    modules = find_modules(model, family, options)
    kv_heads = check_attention(modules["attention"], family, options.ratio, merge_kv=False)
    patch_modules(model, family, modules, options, kv_heads, "auto")


def find_modules(model: nn.Module, family: Family, options: PatchOptions) -> dict[str, dict[str, Any]]:
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


def check_attention(
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
            weight = getattr(module, projection).weight
            if type(weight) is not nn.Parameter:
                raise ValueError(
                    f"{name}.{projection}.weight is a {type(weight).__name__} (sharded or quantized); patch the model "
                    "first, then shard or quantize it"
                )
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


def check_feed_forward(modules: dict[str, dict[str, Any]], options: PatchOptions) -> None:
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


def patch_modules(
    model: Any,
    family: Family,
    modules: dict[str, dict[str, Any]],
    options: PatchOptions,
    kv_heads: dict[str, tuple[int, int]],
    backend: str,
) -> list[ModuleReport]:
    """Put patched modules in the place of the host's, which were checked; returns what was done."""
    reports = []
    for name, module in modules["attention"].items():
        patched, report = _differential(name, module, family, options, kv_heads[name], backend)
        model.set_submodule(name, patched)
        reports.append(report)
    if modules["attention"]:
        model.config.num_key_value_heads = next(iter(kv_heads.values()))[1]
        model.config._attn_implementation = IMPLEMENTATION
    swapped = [(n, m, ["gate_proj", "up_proj", "down_proj"]) for n, m in modules["feed_forward"].items()]
    if options.experts == "swap":
        swapped += [(n, m, ["gate_up_proj", "down_proj"]) for n, m in modules["experts"].items()]
    else:
        reports += [ModuleReport(n, "as it was", ["all (routed experts)"]) for n in modules["experts"]]
    for name, module, kept in swapped:
        model.set_submodule(name, with_poly_norm(module, fused=name in modules["feed_forward"]))
        lost = f"{type(module.act_fn).__name__} activation"
        added = ["act_fn.weight", "act_fn.bias"]
        reports.append(ModuleReport(name, "PolyNorm", kept, added, lost=[lost], exact=False))
    return reports


def _differential(
    name: str, module: Any, family: Family, options: PatchOptions, kv_heads: tuple[int, int], backend: str
) -> tuple[Any, ModuleReport]:
    heads, (before, after) = _query_heads(module, family), kv_heads
    held = dict(module.named_parameters())
    patched = differential_module(module, family)
    merged = ""
    if family.latent:
        replace_latents(patched, kv_heads=after)
    elif before != after:
        _merge(patched, before, after, heads)
        merged = f"{before} key/value heads merged to {after} (means)"
    add_noise_heads(patched, options, heads, norm_heads_dim=family.norm_heads_dim, backend=backend)
    now = dict(patched.named_parameters())
    own = {id(p) for p in held.values()}
    kept = ["scale"] if family.latent else ["scale", "window", "rotary"]
    exact = options.attention_is_exact and not merged and not family.latent
    what = f"{options.attention}: {heads} signal, {heads // options.ratio} noise, {after} key/value heads"
    return patched, ModuleReport(
        name,
        what,
        kept=kept + [n for n, p in now.items() if id(p) in own],
        added=[n for n, p in now.items() if id(p) not in own and n not in held],
        grown=[n for n in now if n in held and n.startswith("q_proj.")],
        lost=list(LOST) if family.latent else [],
        merged=merged,
        exact=exact,
    )


def _merge(module: Any, before: int, after: int, heads: int) -> None:
    """Replace each run of before / after neighbouring key/value heads by its mean."""

    def mean(tensor: Tensor) -> Tensor:
        # (after, run, D, ...) -> (after * D, ...)
        return tensor.detach().unflatten(0, (after, before // after, -1)).mean(dim=1).flatten(0, 1).to(tensor.dtype)

    module.k_proj, module.v_proj = linear_of(module.k_proj, mean), linear_of(module.v_proj, mean)
    module.num_key_value_groups = heads // after
    if hasattr(module, "num_key_value_heads"):
        module.num_key_value_heads = after
