"""What is measured of a finished run besides its losses: the retrieval probe, attention statistics
and speed.

As a process: ``python -m motifarch.study.measure RUN --output FILE``.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from motifarch.data import PackedDataset
from motifarch.errors import UserError, first_line
from motifarch.files import write_json
from motifarch.models.motif import MotifForCausalLM
from motifarch.study.attention_statistics import attention_statistics, gradient_norm_spikes
from motifarch.study.measure_options import MeasureOptions
from motifarch.study.probe import find_lines, model_scorer, probe
from motifarch.study.speed import decoding_speed, training_speed
from motifarch.tokenizer.loading import load_tokenizer
from motifarch.train.manifest import find_newest
from motifarch.train.run_folder import METRICS, read_metrics
from motifarch.train.step import spread_rows
from motifarch.train.trained_model import load_trained_model, read_about


def measure(
    run: Path,
    *,
    seed: int,
    device: str = "cpu",
    options: MeasureOptions | None = None,
    show: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measures the newest complete checkpoint of a run.

    Args:
        run: the run's output folder.
        seed: of the probe's questions: runs on the same data with the same seed and options are
            asked the same.
        device: for example "cpu" or "cuda".
        options: how much; default ``MeasureOptions()``.
        show: told what is being measured.

    Returns:
        For JSON: "probe" (as :func:`motifarch.study.probe.probe` describes it), "attention" (
        :func:`motifarch.study.attention_statistics.attention_statistics`, and gradient_norm_spikes
        of the whole run) and "speed" (:func:`motifarch.study.speed.training_speed` and
        :func:`~motifarch.study.speed.decoding_speed`). Probe and attention are computed in float32,
        and decoding is timed in the precision that the run computed in, which "speed" has as
        decode_dtype.

    Raises:
        UserError: there is no finished run, or its data is gone; the message names the fix.
    """
    options = MeasureOptions() if options is None else options
    show("checkpoint")
    checkpoint = find_newest(run)
    if checkpoint is None:
        raise UserError(f"{run} holds no complete checkpoint; give the output folder of a finished motifarch train run")
    about = read_about(checkpoint)
    model = _load_model(checkpoint, device)
    datasets = [PackedDataset.open(entry["path"], "validation") for entry in about["data"]]
    lines = find_lines(load_tokenizer(datasets[0].folder / "tokenizer"), datasets[0])
    metrics = read_metrics(run / METRICS)
    seq_len = datasets[0].seq_len
    asked = probe(
        model_scorer(model),
        lines,
        datasets,
        lengths=options.lengths or [seq_len // 4, seq_len // 2, seq_len],
        samples=options.samples,
        seed=seed,
        depths=options.depths,
        rows=options.probe_rows,
        show=show,
    )
    show("attention")
    rows = [dataset[row] for dataset, row in spread_rows(datasets, options.attention_rows)]
    attention = attention_statistics(model, rows)
    show("decoding")
    decoding = _time_decoding(model, datasets[0], about["compute"], options)
    return {
        "probe": asked,
        "attention": {**attention, "gradient_norm_spikes": gradient_norm_spikes(metrics)},
        "speed": {**training_speed(metrics), **decoding},
    }


def _load_model(checkpoint: Path, device: str) -> MotifForCausalLM:
    """A checkpoint's model, float32, in evaluation mode."""
    model = load_trained_model(checkpoint)
    try:
        model.to(device=device)  # type: ignore[call-arg]  # transformers hides its signature
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(
            f"device {device!r} cannot be used ({first_line(error)}); give cpu, or cuda on a machine with a GPU"
        ) from None
    return model.float().eval()


def _time_decoding(
    model: MotifForCausalLM, data: PackedDataset, compute: str, options: MeasureOptions
) -> dict[str, float | int | str]:
    """Decoding in the run's precision, which leaves the model in it."""
    model.to(dtype=getattr(torch, compute))  # type: ignore[call-arg]
    positions: int = model.config.max_position_embeddings
    prefill = min(options.prefill_tokens or data.seq_len, positions - options.new_tokens - 1)
    if prefill < 1:
        raise UserError(
            f"new_tokens is {options.new_tokens}, but the model has {positions} positions: give at most {positions - 2}"
        )
    rows = [data[i % len(data)].input_ids[:-1] for i in range(prefill // data.seq_len + 1)]
    prompt = torch.tensor(np.concatenate(rows)[None, : prefill + 1], dtype=torch.long, device=model.device)
    speed = decoding_speed(model, prompt, new_tokens=options.new_tokens, repeats=options.repeats)
    return {**speed, "decode_dtype": compute}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`measure`."""
    defaults = MeasureOptions()
    parser = argparse.ArgumentParser(prog="python -m motifarch.study.measure", description=__doc__)
    parser.add_argument("run", type=Path, help="the output folder of a finished motifarch train run")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the probe's questions (default: 0)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    for field in dataclasses.fields(MeasureOptions):
        default = getattr(defaults, field.name)
        many = isinstance(default, tuple)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=float if field.name == "depths" else int,
            nargs="+" if many else None,
            default=default,
            help=f"default: {' '.join(map(str, default)) if many and default else default or 'from the run'}",
        )
    given = parser.parse_args(argv)
    options = MeasureOptions(**{field.name: getattr(given, field.name) for field in dataclasses.fields(MeasureOptions)})
    with Console(stderr=True).status("") as status:
        found = measure(given.run, seed=given.seed, device=given.device, options=options, show=status.update)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.output, found)
    print(f"measured {given.run} into {given.output}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
