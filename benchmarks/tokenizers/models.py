"""Small models of BPE and of SuperBPE, equal in training FLOPs and in bytes of text: bits per byte.

    python -m benchmarks.tokenizers.corpus unpacked --output corpora
    python -m benchmarks.tokenizers.models corpora --work runs/tokenizers

Both tokenizers have 16,384 tokens and are trained on the training pages, as in
`benchmarks.tokenizers.compression`. SuperBPE has fewer tokens for the same text. So its rows are
shorter, and a row, a step and a run hold as many bytes of text as BPE's; and its feed-forward
blocks are wider, so that a run costs the same FLOPs, embedding and output projection included
(Liu et al., arXiv 2503.13423, keep bytes of context equal too, and one of their comparisons FLOPs).
Each run reads all training pages once, in an order of its seed. Losses are of 98% of the held-out
pages, the same for both, which neither tokenizer nor model has seen. Differences are paired by
seed. One learning rate, the tiny recipe's, serves both.

A finished run is not run again; one that was stopped or killed goes on from its checkpoint: give
the same command. `--report` shows what there is meanwhile.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import cli, report
from benchmarks.models.motif_3_ablation import BATCH, Run, build, train
from benchmarks.tokenizers.compression import texts
from motifarch.data.prepare import main as prepare
from motifarch.export import export
from motifarch.inference.validation import validate
from motifarch.locks import locked
from motifarch.study.analysis import estimate, paired
from motifarch.study.intermediate_size import match_intermediate_size
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.superbpe import train_superbpe
from motifarch.tokenizer.train import as_pretrained, least_size, train_bpe

MODULE = "benchmarks.tokenizers.models"
KINDS = {"bpe": "BPE", "superbpe": "SuperBPE"}
LANGUAGES = ("korean", "english")
SEQ_LEN = 128  # of BPE
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,  # of BPE
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_noise_heads": 1,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_type": "gda",
    "hidden_act": "poly_norm",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.088,
}


def make_tokenizers(options: argparse.Namespace, console: Console) -> None:
    """Trains what is not there."""
    special, size = SpecialTokens(), options.vocab_size
    for kind, name in KINDS.items():
        folder = options.work / kind / "tokenizer"
        if folder.is_dir():
            continue
        console.print(f"training {name}")
        prose = (text for _, text in texts(options.corpora, "train", LANGUAGES))
        if kind == "bpe":
            made = train_bpe(prose, size, special)
        else:
            stage_1 = least_size(special) + (size - least_size(special)) * 5 // 8
            made = train_superbpe(prose, size, special, stage_1_size=stage_1)
        as_pretrained(made, special).save_pretrained(folder)


def make_data(options: argparse.Namespace, kind: str, part: str, seq_len: int, validation: float) -> dict[str, Any]:
    """Prepares a tokenizer's data, or finds them; their record."""
    output = options.work / kind / f"{part}_{seq_len}"
    sources = [f"--source=files:{options.corpora / f'{language}_{part}.jsonl'}" for language in LANGUAGES]
    settings = {"--tokenizer": options.work / kind / "tokenizer", "--output": output, "--seq-len": seq_len}
    settings |= {"--validation-fraction": validation, "--num-proc": 1}
    prepare([*sources, *(str(word) for pair in settings.items() for word in pair)])
    found: dict[str, Any] = json.loads((output / "data.json").read_text(encoding="utf-8"))
    return found | {"folder": str(output)}


def bytes_per_token(record: dict[str, Any], split: str) -> float:
    """Of a split of prepared data."""
    return float(record["splits"][split]["bytes"] / record["splits"][split]["tokens"])


def make_models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each tokenizer's data, row length, steps and model, equal in bytes and FLOPs."""
    plain = make_data(options, "bpe", "train", SEQ_LEN, 0.02)
    ratio = bytes_per_token(plain, "train") / bytes_per_token(
        make_data(options, "superbpe", "train", SEQ_LEN, 0.02), "train"
    )
    shorter = round(SEQ_LEN * ratio)
    found = []
    steps = plain["splits"]["train"]["blocks"] // BATCH
    target = 0.0
    for kind, label in KINDS.items():
        seq_len = SEQ_LEN if kind == "bpe" else shorter
        data = plain if kind == "bpe" else make_data(options, kind, "train", seq_len, 0.02)
        fields = MODEL | {"vocab_size": -(-data["vocab_size"] // 64) * 64}
        if kind == "bpe":
            target = build(fields).flops_per_token(seq_len) * seq_len
        else:

            def flops(width: int, fields: dict[str, Any] = fields, seq_len: int = seq_len) -> float:
                return build(fields | {"intermediate_size": width}).flops_per_token(seq_len) * seq_len

            fields["intermediate_size"] = match_intermediate_size(flops, target)
        model = build(fields)
        flops_per_row = model.flops_per_token(seq_len) * seq_len
        found.append(
            {
                "model": kind,
                "label": label,
                "fields": fields,
                "data": data["folder"],
                "seq_len": seq_len,
                "steps": min(steps, data["splits"]["train"]["blocks"] // BATCH),
                "bytes_per_row": bytes_per_token(data, "train") * seq_len,
                "flops_per_row": flops_per_row,
                "deviation": flops_per_row / target - 1,
                "parameters": model.num_parameters(),
                "parameters_outside_the_embedding": model.num_parameters() - fields["vocab_size"] * 128,
            }
        )
    fewest = min(row["steps"] for row in found)
    return [row | {"steps": min(fewest, options.steps or fewest)} for row in found]


def make_run(options: argparse.Namespace, model: dict[str, Any], seed: int) -> Run:
    """A run of one of them."""
    steps, folder = model["steps"], options.work / model["model"] / f"seed_{seed}"
    optim = {"name": "muon", "ns_dtype": "float32", "lr": options.lr, "weight_decay": 0.1, "clip": 1.0, "z_loss": 1e-4}
    optim |= {"schedule": "wsd", "warmup_steps": steps // 25, "decay_steps": steps * 7 // 10, "min_lr_ratio": 0.05}
    recipe = {
        "run": {"output": str(folder), "steps": steps, "seed": seed},
        "model": model["fields"],
        "data": {"datasets": [{"path": model["data"]}]},
        "batch": {"size": BATCH, "micro_size": BATCH},
        "optim": optim,
        "precision": {"compute": "float32"},
        "checkpoint": {"every": max(1, steps // 8), "keep_last": 1},
        "validation": {"every": max(1, steps // 4), "sequences": 64},
        "log": {"every": 5, "tensorboard": False},
    }
    return Run(f"{model['label']}, seed {seed}", model["model"], seed, folder, recipe)


def result(run: Run, model: dict[str, Any], held_out: str) -> dict[str, Any]:
    """A finished run's losses on the held-out pages, computed once."""
    kept = run.folder / "held_out.json"
    if not kept.is_file():
        folder = run.folder / "export"
        if not folder.is_dir():
            export(run.folder)
        report.write_json(kept, validate(folder, Path(held_out)))
    found = json.loads(kept.read_text(encoding="utf-8"))
    row = {
        "model": run.model,
        "seed": run.seed,
        "steps": run.steps,
        "bytes": run.steps * BATCH * model["bytes_per_row"],
    }
    return row | {name: found[name] for name in ("bits_per_byte", "loss", "tokens")}


def statistics(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means by tokenizer, and SuperBPE's difference from BPE, paired by seed."""
    losses = {kind: {row["seed"]: row["bits_per_byte"] for row in results if row["model"] == kind} for kind in KINDS}
    means = {kind: estimate([*values.values()]) for kind, values in losses.items()}
    difference = paired(losses["superbpe"], losses["bpe"])
    return {
        "means": {kind: dataclasses.asdict(mean) for kind, mean in means.items() if mean},
        "difference": dataclasses.asdict(difference) if difference else None,
    }


def run(options: argparse.Namespace, console: Console) -> int:
    """Train what is missing, and report."""
    options.corpora, options.work = options.corpora.resolve(), options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    env = report.environment(MODULE, torch.device("cpu"), ("motifarch", "torch", "tokenizers", "transformers"))
    with locked(options.work / ".lock", (f"another process ({{}}) trains in --work {options.work}").format):
        make_tokenizers(options, console)
        models = make_models(options)
        held_out = {
            row["model"]: make_data(options, row["model"], "held_out", row["seq_len"], 0.98)["folder"] for row in models
        }
        # By seeds, so that what is cut short has both of the first ones.
        runs = [(make_run(options, model, seed), model) for seed in options.seeds for model in models]
        if not options.report:
            train([each for each, _ in runs], options, console)
        results = [result(each, model, held_out[model["model"]]) for each, model in runs if each.finished]
    # A folder of this machine says nothing elsewhere.
    told = [row | {"data": str(Path(row["data"]).relative_to(options.work))} for row in models]
    content = {"benchmark": "tokenizer_models", "environment": env, "learning_rate": options.lr, "models": told}
    content |= {"runs": results} | statistics(results)
    report.write_json(options.output, content)
    cells = [
        (
            f"{row['model']}, seed {row['seed']}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['loss']:.4f}",
            f"{row['bytes'] / 1e6:.2f}",
        )
        for row in results
    ]
    columns = ["", "bits/byte", "nats/token", "MB of text"]
    console.print(report.table("Held-out Korean and English pages", columns, cells))
    console.print(statistics(results)["difference"])
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser(MODULE, __doc__)
    add = made.add_argument
    add("corpora", type=Path, help="what benchmarks.tokenizers.corpus wrote")
    add("--work", type=Path, required=True, help="folder of the runs, which the same command goes on with")
    add("--vocab-size", type=int, default=16384, help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=int, help="default: all training pages once")
    add("--lr", type=float, default=1.2e-2, help="default: %(default)s")
    add("--jobs", type=int, default=1, help="runs at a time; default: %(default)s")
    add("--threads", type=int, default=1, help="CPU threads of each; default: %(default)s")
    add("--report", action="store_true", help="report what is finished, and train nothing")
    add("--output", type=Path, default=report.RESULTS / "tokenizer_models_cpu.json", help="JSON file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(argv)
    return cli.resumed_status(lambda: run(options, Console()))


if __name__ == "__main__":
    sys.exit(main())
