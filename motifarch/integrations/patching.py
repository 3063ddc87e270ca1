"""`patch`: differential attention and PolyNorm in a transformers model that exists."""

from dataclasses import asdict
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from motif_kernels.dispatch import BACKENDS
from motifarch.integrations.configuration import PatchOptions
from motifarch.integrations.modules import (
    check_attention,
    check_feed_forward,
    check_forwards,
    find_modules,
    patch_modules,
)
from motifarch.integrations.report import PatchReport
from motifarch.integrations.saving import PatchedModelMixin, as_patched

_CHOICES: dict[str, tuple[Any, ...]] = {
    "attention": ("gda", "diff_v2", None),
    "feed_forward": ("polynorm", None),
    "experts": ("keep", "swap", None),
    "backend": tuple(BACKENDS),
}


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

    Attention modules are known by their projections, whatever their family. One of each kind is run
    on random tokens before anything changes, and must be the same function when it is patched:
    what it does besides (sinks, a gate) is refused by name.

    Args:
        model: on any device; on the meta device, where nothing can be run, of a family in
            :data:`motifarch.integrations.families.FAMILIES`.
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
            swapped), or "swap" their activation too, one PolyNorm a layer; None raises for such a
            model.
        backend: motif_kernels' backend.

    Returns:
        What was kept, added and lost, module by module; print it.

    Raises:
        TypeError: model is no transformers model.
        ValueError: a module, option or ratio that does not fit; the model is as it was.
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
    options = PatchOptions(attention, ratio, feed_forward, sub_norm, float(lambda_init), experts)
    modules = find_modules(model, options)
    kv_heads = check_attention(modules["attention"], ratio, merge_kv=merge_kv)
    check_feed_forward(model, modules, options)
    forwards = check_forwards(model, modules["attention"], kv_heads) if attention else {}
    record = {"host": host, **asdict(options), "forwards": {name: asdict(f) for name, f in forwards.items()}}
    as_patched(model, record)
    reports = patch_modules(model, modules, options, kv_heads, forwards, backend)
    done = [f"attention {attention} {ratio}:1"] if attention else []
    done += ["feed-forward polynorm"] if feed_forward else []
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return PatchReport(f"{host}: {', '.join(done)}", sorted(reports, key=lambda r: order[r.name]))
