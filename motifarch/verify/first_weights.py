"""Makes a run's first weights again from its seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from motifarch.ledger.chain import Entry
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel import initialize
from motifarch.train.run_folder import read_record
from motifarch.train.saved_hashes import weights_root
from motifarch.verify.findings import Findings


def verify_first_weights(folder: Path, chain: Sequence[Entry], device: str = "cpu") -> Findings:
    """Compares the ledger's first entry with the weights that its seed gives.

    Args:
        folder: the run's.
        chain: its entries, the newest first.
        device: where they are made; random numbers of a GPU are others than a CPU's.
    """
    found, check = Findings(), "The first weights are those that the seed makes."
    first = chain[-1]
    if first.link.get("kind") != "first weights" or first.link.get("origin") is not None:
        found.add(check, unknown="they came from elsewhere")
        return found
    fields: dict[str, Any] | None = read_record(folder).get("model_config")
    if fields is None:
        found.add(check, unknown="run.json does not say what model it is")
        return found
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig(**fields))
    initialize(model, torch.device(device), first.link["seed"])
    same = weights_root(model) == first.link["weights"]
    found.add(check, [] if same else [f"seed {first.link['seed']} makes others"])
    return found
