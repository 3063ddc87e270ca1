"""A checkpoint becomes a Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from motifarch.errors import UserError, first_line
from motifarch.export.chat_template import plain_chat_template
from motifarch.export.model_card import write_card
from motifarch.field_types import is_import_path
from motifarch.files import claim_folder, new_folder, sha256, write_json
from motifarch.ledger.derived import note_derived
from motifarch.model_folder import without_bars
from motifarch.portable import add_code
from motifarch.storage import is_url
from motifarch.tokenizer.loading import tokenizer_fingerprint
from motifarch.train.fetching import fetched_run
from motifarch.train.lineage import checkpoint_source
from motifarch.train.manifest import MANIFEST, find_newest, read_manifest, step_of
from motifarch.train.run_folder import RECORD, read_record
from motifarch.train.trained_model import load_trained_model, read_about

ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    source: Path | str,
    output: Path | None = None,
    *,
    dtype: str = "float32",
    tokenizer: str | None = None,
    with_code: bool = False,
    adapter: bool = False,
    origin_name: str | None = None,
) -> Path:
    """Turn a checkpoint into a Hugging Face folder: config, safetensors, tokenizer, model card, the
    run's record.

    A tokenizer without a chat template gets a plain one, which the card names.

    Args:
        source: a run's output folder (its newest complete checkpoint is taken) or a checkpoint's; a
            URL's is copied beside the output meanwhile.
        output: where to write; default ``export`` (``adapter``) in the run's folder. An earlier one
            there is replaced once the new one is whole.
        dtype: "float32", as trained, or "bfloat16".
        tokenizer: a tokenizer folder; default that of the run's data.
        with_code: write the model code too, so that the folder loads without motifarch.
        adapter: write the adapters that the run trained alone, as peft does, for the model of
            ``run.init_from``; otherwise they become part of the weights.
        origin_name: what export.json and the model card call the checkpoint, where that is not its
            path.

    Returns:
        The folder written.

    Raises:
        UserError: no run, no complete checkpoint or no tokenizer there, or the disk can't be
            written.
    """
    if isinstance(source, str) and is_url(source):
        if output is None:
            raise UserError(f"{source} is a URL, beside which no export can be written; give --output DIR")
        with fetched_run(source, near=output) as copy:
            return export(
                copy,
                output,
                dtype=dtype,
                tokenizer=tokenizer,
                with_code=with_code,
                adapter=adapter,
                origin_name=source,
            )
    run, checkpoint = _resolve(Path(source))
    about = read_about(checkpoint)
    if adapter and with_code:
        raise UserError("--adapter and --with-code: adapters come without a model's code; leave one of them out")
    if with_code and is_import_path(str(about["model_config"].get("attention_type"))):
        raise UserError(
            f"--with-code: the model's attention is code of your own ({about['model_config']['attention_type']}), "
            "which the folder would lack; leave --with-code out; who loads it has to have that code"
        )
    if adapter and not about.get("lora"):
        raise UserError(f"--adapter: {checkpoint} holds no adapters, its run trained all weights; leave --adapter out")
    output = output or run / ("adapter" if adapter else "export")
    if output.exists() and not (output / (ADAPTER_CONFIG if adapter else "config.json")).is_file():
        raise UserError(f"{output} exists and is no exported model; give another --output")
    saved_tokenizer = _load_tokenizer(tokenizer, about)
    model = load_trained_model(checkpoint, merge=not adapter)
    if adapter:
        model.peft_config["default"].base_model_name_or_path = about["init_from"]
    model.to(dtype=DTYPES[dtype])  # type: ignore[call-arg]  # transformers hides its signature
    eos, pad = saved_tokenizer.eos_token_id, saved_tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos if pad is None else pad)
    own_chat_template = saved_tokenizer.chat_template is not None
    if not own_chat_template:
        saved_tokenizer.chat_template = plain_chat_template(saved_tokenizer)
    record = read_record(run)
    with claim_folder(output, print), new_folder(output) as folder:
        with without_bars():
            model.save_pretrained(folder)
        saved_tokenizer.save_pretrained(folder)
        if record:
            shutil.copyfile(run / RECORD, folder / RECORD)
        else:
            print(f"warning: {run / RECORD} is missing or damaged, so the export lacks it")
        origin = {
            "checkpoint": origin_name or str(checkpoint),
            "manifest_sha256": sha256(checkpoint / MANIFEST),
            "step": read_manifest(checkpoint)["step"],
            "dtype": dtype,
        }
        how = {"dtype": dtype, "adapter": adapter}
        entry = note_derived(folder, "export", checkpoint, checkpoint_source(checkpoint), **how)
        origin |= {"ledger_entry": entry.hash}
        write_json(folder / "export.json", origin)
        if with_code:
            add_code(folder)
        if not adapter:  # peft writes a card of its own
            write_card(
                folder,
                model,
                name=output.name if output.name != "export" else run.resolve().name,
                run=run,
                record=record,
                about=about,
                origin=origin,
                with_code=with_code,
                own_chat_template=own_chat_template,
            )
    return output


def _resolve(source: Path) -> tuple[Path, Path]:
    """The run's folder and the checkpoint to export."""
    if not source.is_dir():
        raise UserError(f"{source} is no folder; give a run's output folder or one of its checkpoints")
    if step_of(source) is not None:
        return source.resolve().parent.parent, source
    checkpoint = find_newest(source, lambda line: print(f"warning: {line}"))
    if checkpoint is None:
        raise UserError(f"{source} holds no complete checkpoint; give a run's output folder, such as runs/tiny_cpu")
    return source, checkpoint


def _load_tokenizer(given: str | None, about: dict[str, Any]) -> PreTrainedTokenizerBase:
    folder = given or str(Path(about["data"][0]["path"]) / "tokenizer")
    if given is None and not Path(folder).is_dir():
        raise UserError(f"the run's data is gone and its tokenizer with it ({folder}); name one with --tokenizer")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds for damaged files
        raise UserError(
            f"{folder} holds no tokenizer that loads: {first_line(error)}; name one with --tokenizer"
        ) from None
    if given is None and tokenizer_fingerprint(tokenizer) != about["tokenizer"]:
        raise UserError(f"the tokenizer {folder} has changed since the run read it; name its copy with --tokenizer")
    rows = about["model_config"]["vocab_size"]
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer {folder} has {len(tokenizer)} tokens but the model {rows}; give the run's own")
    return tokenizer
