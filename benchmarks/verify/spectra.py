"""Whether the spectra of attention's products tell a model that was made from another.

    python -m benchmarks.verify.spectra --work runs/similarity

The singular values of a query head's and a key head's weights multiplied, the norm before them
included, do not change when channels are permuted or rotated, heads permuted, or queries scaled
against keys: no embeddings are needed to align anything. Taken are their logarithms, less the mean
(the scale of a head), and less what heads of both models have in common (all spectra fall alike). A
layer's likeness is the correlation of the rest, heads matched so that it is largest; a model's that
of its most alike layer.

The models and what is made of them are those of `python -m benchmarks.verify.similarity`; those of
its --work are not trained again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from benchmarks.lib import cli, report
from benchmarks.verify.disguises import State, disguised
from benchmarks.verify.similarity import FILE, KINDS, LAYOUTS, SETUP, SHARED, Zoo, add_options, new_model, pairs, title
from motifarch.progress import progress

OF = (KINDS[0], KINDS[1], KINDS[2])


def spectra(state: State, layer: int) -> torch.Tensor:
    """Of every pair of a query and a key head, for which pairs attend to each other is the
    architecture's: (pairs, head_dim), logarithms of singular values less their mean.
    """
    at = f"model.layers.{layer}."
    norm = state[at + "input_layernorm.weight"].double()
    triangles = []
    for side in "qk":
        heads = (state[at + f"self_attn.{side}_proj.weight"].double() * norm).unflatten(0, (-1, SHARED["head_dim"]))
        triangles.append(torch.linalg.qr(heads.mT)[1])
    found = torch.linalg.svdvals(triangles[0][:, None] @ triangles[1][None].mT).log().flatten(0, 1)
    return found - found.mean(dim=-1, keepdim=True)


def likeness(one: torch.Tensor, two: torch.Tensor) -> float:
    """The correlation of two layers' spectra (pairs, head_dim) without what they share."""
    shared = torch.cat([one, two]).mean(dim=0)
    one, two = one - shared, two - shared
    rows, columns = linear_sum_assignment(torch.cdist(one, two).numpy())
    return float(torch.cosine_similarity(one[rows].flatten(), two[columns].flatten(), dim=0))


def of_models(one: State, two: State) -> float:
    """That of the most alike layers."""
    layers = range(SHARED["num_hidden_layers"])
    return max(likeness(spectra(one, i), spectra(two, j)) for i in layers for j in layers)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind: the likenesses of its pairs."""
    zoo = Zoo(options.work, options.steps, options.floor_steps)
    rows: list[dict[str, Any]] = []

    def trained(layout: str, seed: int) -> State:
        return load_file(zoo.trained(layout, seed) / FILE)

    found = []
    with progress("independent pairs", options.pairs, of="pairs") as advance:
        for layout, one, two in pairs(options.models, options.pairs):
            found.append(round(of_models(trained(layout, one), trained(layout, two)), 4))
            advance()
    rows.append({"kind": "independent", "disguise": "", "likeness": found})
    with progress("copies", len(OF), of="kinds") as advance:
        for kind in OF:
            for disguise in ("", "rotated and scaled"):
                found = []
                for i in range(options.bases * len(LAYOUTS)):
                    layout, seed = list(LAYOUTS)[i % 2], i // 2
                    state = zoo.derived(kind, layout, seed, 0, options.bases)
                    if disguise:
                        state = disguised(state, new_model(layout, 0).config, i, rotate=True)
                    found.append(round(of_models(trained(layout, seed), state), 4))
                rows.append({"kind": kind, "disguise": disguise, "likeness": found})
            advance()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = cli.bare_parser("benchmarks.verify.spectra", __doc__)
    add_options(parser)
    parser.add_argument("--output", type=Path, default=report.RESULTS / "spectra.json", help="JSON")
    options = parser.parse_args(argv)
    console = Console()

    def run() -> int:
        torch.set_num_threads(1)
        env = cli.introduce("benchmarks.verify.spectra", torch.device("cpu"), ("torch", "scipy"), console)
        rows = measure(options)
        lines = []
        for row in rows:
            quantiles = [f"{value:.2f}" for value in np.quantile(row["likeness"], (0, 0.5, 1))]
            lines.append((title(row), str(len(row["likeness"])), *quantiles))
        console.print(report.table("Spectra of small models", ["", "pairs", "least", "median", "most"], lines))
        setup = {name: getattr(options, name) for name in SETUP if name != "copies"}
        report.write_json(options.output, {"environment": env, "setup": setup, "rows": rows})
        return 0

    return cli.resumed_status(run)


if __name__ == "__main__":
    sys.exit(main())
