"""What Motif-3's parts do for a small model: one changed at a time, at equal training FLOPs.

    motifarch data prepare --source stdlib --output data/stdlib --seq-len 128
    python -m benchmarks.models.motif_3_ablation --work runs/motif_3_ablation

The base is a small Motif-3: GDLA 4:1, 16 experts with PolyNorm of which a token takes 4, and
hyper-connections of 4 streams (mHC), but no multi-token prediction. Each variant changes one part,
and the experts' width with it, so that a token costs the same FLOPs; parameters and cache follow
and are reported. All runs read as many tokens, those of one seed the same in the same order, and
are validated on the same rows.

- `mla`: no noise head, the same query heads over the same latents: softmax attention.
- `gda`: no latents. GDA 4:1 with ordinary queries, keys and values and a gate from the token (DIFF
  V2's lambda): the other differences between Motif-2's attention and GDLA (the sub-norm, lambda by
  layer, paired keys) are left out. Heads are as wide as GDLA's on average, and wholly rotated.
- `swiglu`: SwiGLU in place of PolyNorm, in the experts and in the dense first layer.
- `no_mhc`: a residual stream in place of four.

One learning rate serves all: the best of `--sweep`, tried on the base alone with another seed and a
quarter of the steps. So the base is the best tuned, if any is. A single rate is taken untried.

A finished run is not run again; one that was stopped or killed goes on from its checkpoint: give
the same command. `--report` shows what there is meanwhile. Differences from the base are paired by
seed. Three seeds tell large differences only: the table says from where on.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.lib import cli, report
from benchmarks.models.motif_3_ablation_report import BASE, draw, print_tables, statistics
from motifarch import die_with_parent
from motifarch.errors import UserError
from motifarch.locks import locked
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.study.intermediate_size import match_intermediate_size
from motifarch.train.run_folder import ENDED, METRICS, read_metrics, read_record

MODEL: dict[str, Any] = {
    "tie_word_embeddings": True,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "attention_type": "gdla",
    "attention_gate": True,
    "num_attention_heads": 5,  # 4 signal heads and a noise head
    "num_noise_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "use_sliding_window": True,
    "sliding_window": 32,
    "sliding_window_period": 4,  # the first layer sees all tokens, the next three a window
    "num_experts": 16,
    "experts_top_k": 4,
    "moe_intermediate_size": 64,
    "n_dense_first_layers": 1,
    "route_scale": 2.0,
    "hidden_act": "poly_norm",
    "polynorm_sigmoid_weight": True,
    "polynorm_output_scale": 0.5,
    "polynorm_bias_clamp": 0.5,
    "hidden_clamp": 1e6,
    "mhc_enabled": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "initializer_range": 0.088,  # hidden_size ** -0.5
}
NO_LATENTS = dict.fromkeys(("qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"))
NO_POLY_NORM = {"polynorm_sigmoid_weight": False, "polynorm_output_scale": 1.0, "polynorm_bias_clamp": None}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("base", {}),
    "mla": ("softmax MLA", {"attention_type": "mla", "num_noise_heads": None}),
    # 40 is the mean of 48 and 32: they cost the same. A latent window sees a token more.
    "gda": ("GDA 4:1, no latents", {"attention_type": "diff_v2", "head_dim": 40, "sliding_window": 33} | NO_LATENTS),
    "swiglu": ("SwiGLU", {"hidden_act": "silu"} | NO_POLY_NORM),
    "no_mhc": ("no mHC", {"mhc_enabled": False}),
}
"""Names in tables, and what each changes in the base."""

BATCH = 16
SWEEP_SEED = 1000
"""Of the runs that try learning rates: none of those compared."""
TOLD_EVERY_S = 60.0


@dataclass(frozen=True)
class Run:
    """A training run: its recipe, and the folder with all that is known of it."""

    label: str
    model: str
    seed: int
    folder: Path
    recipe: dict[str, Any] = field(hash=False)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return int(self.recipe["run"]["steps"])

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return bool(read_record(self.folder).get(ENDED) == "complete")

    def write_recipe(self) -> Path:
        """Writes the recipe into the folder.

        Raises:
            UserError: the folder holds a run of another one.
        """
        path, text = self.folder / "recipe.yaml", yaml.safe_dump(self.recipe, sort_keys=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{self.folder} holds a run of another recipe; give another --work, or delete that folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def steps_done(self) -> int:
        """Steps that its metrics hold."""
        rows = read_metrics(self.folder / METRICS)
        return int(rows[-1]["step"]) if rows else 0

    def result(self) -> dict[str, Any]:
        """What came of it: bits per byte are null where it diverged."""
        name, tokens = "validation_bits_per_byte", BATCH * shape(self.recipe["data"]["datasets"][0]["path"])["seq_len"]
        rows = [row for row in read_metrics(self.folder / METRICS) if name in row]
        return {
            "model": self.model,
            "seed": self.seed,
            "learning_rate": self.recipe["optim"]["lr"],
            "tokens": self.steps * tokens,
            "bits_per_byte": rows[-1][name],
            "validation_loss": rows[-1]["validation_loss"],
            "curve": [[row["step"] * tokens, row[name]] for row in rows],
            "commits": [(start["git"] or {}).get("commit") for start in read_record(self.folder)["starts"]],
        }


def shape(data: str | Path) -> dict[str, Any]:
    """The record of prepared data.

    Raises:
        UserError: there is none.
    """
    try:
        return json.loads((Path(data) / "data.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        raise UserError(
            f"--data {data} holds no prepared data; make it with `motifarch data prepare --source stdlib "
            f"--output {data} --seq-len 128`"
        ) from None


def build(fields: dict[str, Any]) -> MotifForCausalLM:
    """The model of some fields, without memory."""
    with torch.device("meta"):
        return MotifForCausalLM(MotifConfig(**fields))


def match(names: Sequence[str], vocab_size: int, seq_len: int) -> list[dict[str, Any]]:
    """Makes variants equal to the base in training FLOPs a token by the width of their experts.

    Returns:
        A row for each: its fields, and what it costs.
    """
    target = build(MODEL | {"vocab_size": vocab_size}).flops_per_token(seq_len)
    rows = []
    for name in names:
        label, changes = VARIANTS[name]
        fields = MODEL | changes | {"vocab_size": vocab_size}

        def flops(width: int, fields: dict[str, Any] = fields) -> float:
            return build(fields | {"moe_intermediate_size": width}).flops_per_token(seq_len)

        fields["moe_intermediate_size"] = match_intermediate_size(flops, target)
        model = build(fields)
        layers, experts = model.model.layers, model.model.expert_layers().values()
        idle = 1 - fields["experts_top_k"] / fields["num_experts"]
        asleep = idle * sum(p.numel() for layer in experts for p in layer.experts.parameters())
        full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
        rows.append(
            {
                "model": name,
                "label": label,
                "fields": fields,
                "parameters": model.num_parameters(),
                "active_parameters": round(model.num_parameters() - asleep),
                "flops_per_token": model.flops_per_token(seq_len),
                "deviation": model.flops_per_token(seq_len) / target - 1,
                # Windows hold a ring, which does not grow.
                "cache_bytes_per_token": torch.bfloat16.itemsize * sum(layers[i].self_attn.cache_width for i in full),  # type: ignore[union-attr, misc]
            }
        )
    return rows


def make_run(options: argparse.Namespace, model: dict[str, Any], seed: int, lr: float, *, sweep: bool = False) -> Run:
    """A run of a variant."""
    name = model["model"]
    steps = max(1, options.steps // 4) if sweep else options.steps
    folder = options.work / (f"sweep/lr_{lr:g}" if sweep else f"{name}/seed_{seed}")
    every = max(1, steps // 5)
    optim = {"name": "muon", "ns_dtype": "float32", "lr": lr, "weight_decay": 0.1, "clip": 1.0, "z_loss": 1e-4}
    optim |= {"schedule": "wsd", "warmup_steps": steps // 25, "decay_steps": steps * 7 // 10, "min_lr_ratio": 0.05}
    if model["fields"]["mhc_enabled"]:
        optim["mhc_post_alpha_steps"] = steps  # Motif-3 annealed it through pretraining
    recipe = {
        "run": {"output": str(folder), "steps": steps, "seed": seed},
        "model": model["fields"],
        "data": {"datasets": [{"path": str(options.data)}]},
        "batch": {"size": BATCH, "micro_size": BATCH},
        "optim": optim,
        "experts": {"bias_rate": 1e-2},  # Motif-3's 1e-3 would take longer than this run
        "precision": {"compute": "float32"},
        "checkpoint": {"every": every, "keep_last": 1},
        "validation": {"every": every, "sequences": options.sequences},
        "log": {"every": 1, "tensorboard": False},
    }
    return Run(f"learning rate {lr:g}" if sweep else f"{name}, seed {seed}", name, seed, folder, recipe)


def start(run: Run, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Starts a run's process, or resumes it; it ends, and saves, with this one."""
    command = [sys.executable, "-m", "motifarch.train", str(run.write_recipe())]
    threads = str(options.threads)
    with (run.folder / "train.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", die_with_parent.__file__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )


def train(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """Trains what is not finished of some runs, `--jobs` at a time.

    Raises:
        UserError: a run failed, or a folder holds one of another recipe.
    """
    for run in runs:
        run.write_recipe()
    waiting, active = deque(run for run in runs if not run.finished), dict[Run, subprocess.Popen[bytes]]()
    total, begun, told = sum(run.steps for run in runs), time.monotonic(), 0.0
    already = sum(run.steps_done() for run in runs)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=1e9)
    bar = bars.add_task("", total=total, completed=already)
    try:
        with bars:
            while waiting or active:
                while waiting and len(active) < options.jobs:
                    run = waiting.popleft()
                    active[run] = start(run, options)
                time.sleep(0.5)
                for run, process in list(active.items()):
                    if (status := process.poll()) is None:
                        continue
                    del active[run]
                    if status or not run.finished:
                        raise UserError(
                            f"the run {run.label} ended with status {status}; {run.folder / 'train.log'} says why. The "
                            "same command goes on from its checkpoint"
                        )
                    console.print(f"{run.label}: {bits(run)} bits per byte")
                done = sum(run.steps_done() for run in runs)
                working = ", ".join(f"{run.label}: {run.steps_done()}/{run.steps}" for run in active)
                bars.update(bar, completed=done, description=working)
                if not console.is_terminal and active and time.monotonic() - told > TOLD_EVERY_S:
                    told, gone = time.monotonic(), time.monotonic() - begun
                    left = f", {gone / 60 * (total - done) / (done - already):.0f} min left" if done > already else ""
                    console.print(f"{done:,} of {total:,} steps{left}; {working}", soft_wrap=True)
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()


def bits(run: Run) -> str:
    """A finished run's bits per byte in words."""
    value = run.result()["bits_per_byte"]
    return "diverged" if value is None else f"{value:.4f}"


def choose_rate(tried: Sequence[Run]) -> float:
    """The best learning rate of those tried.

    Raises:
        UserError: all diverged.
    """
    found = {run.recipe["optim"]["lr"]: run.result()["bits_per_byte"] for run in tried}
    finite = {rate: value for rate, value in found.items() if value is not None and math.isfinite(value)}
    if not finite:
        raise UserError(f"the base diverged at all rates of --sweep {' '.join(map(str, found))}; try lower ones")
    return min(finite, key=lambda rate: finite[rate])


def check(options: argparse.Namespace) -> None:
    """Checks what the command line says.

    Raises:
        UserError: a number that has no meaning.
    """
    for name in ("steps", "sequences", "jobs", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    options.only = list(dict.fromkeys([BASE, *options.only]))
    options.data = options.data.resolve()
    options.work = options.work.resolve()


def run(options: argparse.Namespace, console: Console) -> int:
    """Train what is missing, and report.

    Raises:
        UserError: an option has no meaning, or a run failed.
    """
    check(options)
    data = shape(options.data)
    models = match(options.only, -(-data["vocab_size"] // 64) * 64, data["seq_len"])
    environment = report.environment(
        "benchmarks.models.motif_3_ablation", torch.device("cpu"), ("motifarch", "torch", "transformers", "numpy")
    )
    sweep = [make_run(options, models[0], SWEEP_SEED, rate, sweep=True) for rate in options.sweep]
    if len(sweep) == 1:
        sweep = []

    def compared() -> list[Run]:
        # By seeds, so that an ablation that is cut short has all variants of the first ones.
        rate = choose_rate(sweep) if sweep else options.sweep[0]
        return [make_run(options, model, seed, rate) for seed in options.seeds for model in models]

    if options.report:
        if not all(tried.finished for tried in sweep):
            raise UserError(f"--work {options.work} has no finished sweep yet; leave out --report to go on with it")
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        refusal = "another process ({}) trains in --work " + str(options.work) + "; wait, or stop it"
        with locked(options.work / ".lock", refusal.format):
            train(sweep, options, console)
            train(compared(), options, console)
    finished = [each.result() for each in compared() if each.finished]
    names = ("steps", "seeds", "sequences", "threads")
    content: dict[str, Any] = {"benchmark": "motif_3_ablation", "environment": environment}
    content["setup"] = {name: getattr(options, name) for name in names} | {
        "batch": BATCH,
        "seq_len": data["seq_len"],
        "data": data["fingerprint"],
        "learning_rate": choose_rate(sweep) if sweep else options.sweep[0],
    }
    content["sweep"] = [each.result() for each in sweep]
    content |= {"models": models, "runs": finished} | statistics(finished)
    print_tables(content, console)
    report.write_json(options.output, content)
    draw(content, options.output.with_suffix(".png"))
    console.print(f"{options.output} and {options.output.with_suffix('.png').name}", soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser("benchmarks.models.motif_3_ablation", __doc__)
    add = made.add_argument
    add("--data", type=Path, default=Path("data/stdlib"), help="prepared data; default: %(default)s")
    add("--work", type=Path, required=True, help="folder of the runs, which the same command goes on with")
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants, beside the base; default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=int, default=400, help="of 16 sequences; default: %(default)s")
    add(
        "--sweep",
        nargs="+",
        type=float,
        default=[6e-3, 1.2e-2, 2.4e-2, 4.8e-2],
        help="learning rates; default: 6e-3 1.2e-2 2.4e-2 4.8e-2",
    )
    add("--sequences", type=int, default=512, help="for validation; default: %(default)s")
    add("--jobs", type=int, default=1, help="runs at a time; default: %(default)s")
    add("--threads", type=int, default=1, help="CPU threads of each; default: %(default)s")
    add("--report", action="store_true", help="report what is finished, and train nothing")
    add("--output", type=Path, default=report.RESULTS / "motif_3_ablation_cpu.json", help="JSON file, a plot beside it")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(argv)
    return cli.resumed_status(lambda: run(options, Console()))


if __name__ == "__main__":
    sys.exit(main())
