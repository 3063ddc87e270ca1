"""The model card of an export: README.md, from what the run recorded."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import motifarch
from motifarch.counted import counted
from motifarch.data.manifest import FILE_NAME as DATA_MANIFEST
from motifarch.data.manifest import Manifest
from motifarch.errors import UserError
from motifarch.files import atomic_write
from motifarch.ledger.chain import Ledger, outside
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.train.run_folder import METRICS, read_metrics

CARD = "README.md"

_ATTENTION = {
    "gda": "grouped differential attention (arXiv 2510.06949)",
    "diff_v1": "differential attention (arXiv 2410.05258)",
    "diff_v2": "DIFF V2 attention",
    "softmax": "softmax attention",
    "gdla": "grouped differential attention from latents (arXiv 2608.09119)",
    "mla": "softmax attention from latents (arXiv 2405.04434)",
}
_HUB = "hf:"


def write_card(
    folder: Path,
    model: MotifForCausalLM,
    *,
    name: str,
    run: Path,
    record: dict[str, Any],
    about: dict[str, Any],
    origin: dict[str, Any],
    with_code: bool,
    own_chat_template: bool,
) -> None:
    """Writes README.md. No path of this machine goes into it.

    Args:
        folder: the exported model's.
        model: the model.
        name: its title.
        run: the run's folder, whose metrics hold the evaluation.
        record: the run's record; empty if it is lost.
        about: what the checkpoint's manifest notes of its run.
        origin: the export's own record: step, dtype, manifest's hash.
        with_code: whether the model code is in the folder.
        own_chat_template: whether the tokenizer came with a chat template.
    """
    data = [_about_data(entry) for entry in about["data"]]
    chain = list((ledger := Ledger.read(folder)).back_from(ledger.entries[-1]))
    seed = chain[-1].link.get("seed")
    kind = model.config.attention_type
    tags = ["motifarch", kind, *(["poly_norm"] if model.config.hidden_act == "poly_norm" else [])]
    of_hub = sorted({source.removeprefix(_HUB) for entry in data for source in entry["sources"] if _on_hub(source)})
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags + (["custom_code"] if with_code else []),
        datasets=of_hub or None,
        model_name=name,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("model_card.md.j2")),
        name=name,
        version=motifarch.__version__,
        attention=_ATTENTION.get(kind, f"{kind}, attention of its own"),
        config=model.config,
        heads=_heads(model.config),
        parameters=model.num_parameters(),
        data=data,
        recipe=record.get("recipe"),
        record=record,
        about=about,
        origin=origin,
        counted=counted,
        chain=chain,
        outside=outside(chain),
        begun=f"the first weights of seed {seed}" if seed is not None else "what it was made of",
        evaluation=_evaluation(run, origin["step"]),
        with_code=with_code,
        own_chat_template=own_chat_template,
    )
    with atomic_write(folder / CARD) as file:
        file.write(card.content)


def _heads(config: MotifConfig) -> str:
    noise = config.noise_heads
    return f"{config.num_attention_heads - noise} signal, {noise} noise" if noise else str(config.num_attention_heads)


def _about_data(entry: dict[str, Any]) -> dict[str, Any]:
    """A data set's name, hash, and what its folder says, if that is still there."""
    folder = Path(entry["path"])
    found: dict[str, Any] = {"name": folder.name, "fingerprint": entry["fingerprint"], "sources": [], "tokens": None}
    if (folder / DATA_MANIFEST).is_file():
        try:
            manifest = Manifest.read(folder)
        except UserError:  # of no use to the card; a run or a prepare says what is wrong with it
            return found
        if manifest.fingerprint == entry["fingerprint"]:
            found["sources"] = [_named(source) for source in manifest.settings.get("sources", [])]
            found["tokens"] = manifest.splits["train"].tokens
    return found


def _named(source: str) -> str:
    """A source without the folders that lead to it on this machine."""
    kind, _, place = source.partition(":")
    return source if not place or _on_hub(source) else f"{kind}:{Path(place).name}"


def _on_hub(source: str) -> bool:
    """Whether a source is a data set's name on the hub."""
    name = source.removeprefix(_HUB)
    return source.startswith(_HUB) and not name.startswith((".", "/", "~")) and not Path(name).expanduser().exists()


def _evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """The last validation until a step."""
    rows = [row for row in read_metrics(run / METRICS) if row["step"] <= step]
    return next((row for row in reversed(rows) if row.get("validation_loss") is not None), None)
