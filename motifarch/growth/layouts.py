"""How much a model has to grow to have a given layout."""

import json
from dataclasses import dataclass
from pathlib import Path

from motifarch.errors import UserError
from motifarch.model_folder import explained
from motifarch.models.motif import MotifConfig

LAYOUTS = {"motif-2-12.7b": MotifConfig}
"""Layouts known by name; MotifConfig's defaults are Motif-2-12.7B's."""

_EQUAL = (
    *("vocab_size", "head_dim", "hidden_act", "qk_norm", "use_bias", "attention_gate", "has_paired_kv", "is_latent"),
    *("num_experts", "mhc_enabled", "num_nextn_predict_layers"),
)


@dataclass(frozen=True)
class Factors:
    """How a model grows; the defaults leave it as it is."""

    hidden: int = 1
    """Multiplies hidden_size."""
    feed_forward: int = 1
    """Multiplies intermediate_size."""
    heads: int = 1
    """Multiplies all heads: signal, noise and key/value."""
    signal_heads: int = 1
    """Multiplies the signal heads of each group; noise and key/value heads stay."""
    layers: int | None = None
    """num_hidden_layers afterwards; None leaves it."""
    untie: bool = False
    """Gives the output projection a matrix of its own."""


def read_layout(layout: str) -> MotifConfig:
    """The config of a layout given by its name, or by a model's folder or config.json.

    Raises:
        UserError: no such name and no such file, or a config that is no Motif model's.
    """
    if layout.lower() in LAYOUTS:
        return LAYOUTS[layout.lower()]()
    path = Path(layout) / "config.json" if Path(layout).is_dir() else Path(layout)
    try:
        return motif_config(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--like {layout}: {error}; give {', '.join(LAYOUTS)}, or the folder or config.json of a Motif model"
        ) from None


def motif_config(fields: object, path: Path) -> MotifConfig:
    """The config in a config.json's fields; the path is for messages.

    Raises:
        UserError: another kind of model, or fields that do not fit each other.
    """
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or str(kind).lower() != "motif":
        raise UserError(f"{path} is no Motif model's: its model_type is {kind!r}, and only 'Motif' grows")
    with explained(f"{path}"):
        config: MotifConfig = MotifConfig.from_dict(fields)
    return config


def factors_to(source: MotifConfig, target: MotifConfig) -> Factors:
    """What turns one layout into another: the factors that the sizes of both give.

    Positions, rope theta and epsilons stay the source's, for the function would change with them.

    Raises:
        UserError: something that does not grow differs, or a size is no whole multiple; the message
            names all of them.
    """
    wrong = [
        f"{name} is {getattr(source, name)!r} and would have to be {getattr(target, name)!r}"
        for name in _EQUAL
        if getattr(source, name) != getattr(target, name)
    ]

    def multiple(what: str, of: int, to: int) -> int:
        if of < 1 or to % of:
            wrong.append(f"{what} {of} does not grow to {to} by a whole multiple")
            return 1
        return to // of

    assert source.num_key_value_heads is not None
    assert target.num_key_value_heads is not None
    hidden = multiple("hidden_size", source.hidden_size, target.hidden_size)
    feed_forward = multiple("intermediate_size", source.intermediate_size, target.intermediate_size)
    heads = multiple("num_key_value_heads", source.num_key_value_heads, target.num_key_value_heads)
    if source.noise_heads * heads != target.noise_heads:
        wrong.append(
            f"noise heads {source.noise_heads} grow as key/value heads do, by {heads}, not to {target.noise_heads}"
        )
    own = (source.num_attention_heads - source.noise_heads) * heads
    signal_heads = multiple("signal heads", own, target.num_attention_heads - target.noise_heads)
    if target.num_hidden_layers < source.num_hidden_layers:
        wrong.append(f"num_hidden_layers {source.num_hidden_layers} can't shrink to {target.num_hidden_layers}")
    if target.tie_word_embeddings and not source.tie_word_embeddings:
        wrong.append("an output projection of its own can't be tied to the embedding again")
    if wrong:
        raise UserError(f"the model does not grow into that layout: {'; '.join(wrong)}")
    return Factors(
        hidden=hidden,
        feed_forward=feed_forward,
        heads=heads,
        signal_heads=signal_heads,
        layers=target.num_hidden_layers,
        untie=source.tie_word_embeddings and not target.tie_word_embeddings,
    )
