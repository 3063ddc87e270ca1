"""Makes a run's first weights again from its seed."""

from collections.abc import Sequence

import torch

from motifarch.ledger.chain import Entry, Ledger
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel import initialize
from motifarch.train.lineage import FIRST_WEIGHTS
from motifarch.train.saved_hashes import weights_root
from motifarch.verify.findings import Findings


def verify_first_weights(ledger: Ledger, chain: Sequence[Entry], device: str = "cpu") -> Findings:
    """Compares the ledger's first entry with the weights that its seed gives.

    Args:
        ledger: the run's.
        chain: its entries, the newest first.
        device: where they are made; random numbers of a GPU are others than a CPU's.
    """
    found, check = Findings(), "The first weights are those that the seed makes."
    first = chain[-1]
    if first.link.get("kind") != FIRST_WEIGHTS or first.link.get("origin") is not None:
        found.add(check, unknown="they came from elsewhere")
        return found
    try:
        fields = ledger.kept(first.link["model"])
    except ValueError as error:
        found.add(check, unknown=f"what model it is is not on record: {error}")
        return found
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig(**fields))
    initialize(model, torch.device(device), first.link["seed"])
    same = weights_root(model) == first.link["weights"]
    found.add(check, [] if same else [f"seed {first.link['seed']} makes others"])
    return found
