"""Makes a run's first weights again from its seed."""

from collections.abc import Sequence

import torch
from huggingface_hub.errors import StrictDataclassError

from motifarch.environment import physical_memory
from motifarch.errors import first_line
from motifarch.ledger.chain import Entry, Ledger
from motifarch.ledger.link import FIRST_WEIGHTS
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel import initialize
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
    if first.link["kind"] != FIRST_WEIGHTS or first.link["origin"] is not None:
        found.add(check, unknown="they came from elsewhere")
        return found
    try:
        model = model_of_seed(ledger, first, device)
    except ValueError as error:
        found.add(check, unknown=str(error))
        return found
    same = weights_root(model) == first.link["weights"]
    found.add(check, [] if same else [f"seed {first.link['seed']} makes others"])
    return found


def model_of_seed(ledger: Ledger, entry: Entry, device: str = "cpu") -> MotifForCausalLM:
    """The model of an entry of first weights, with what its seed makes.

    Raises:
        ValueError: what model it is can't be read, or is code that this process does not trust, or
            memory does not hold it.
    """
    try:
        with torch.device("meta"):
            model = MotifForCausalLM(MotifConfig(**ledger.kept(entry.link["model"])))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"what model it is can't be read ({first_line(error)})") from None
    needed, here = sum(p.numel() * p.itemsize for p in model.parameters()), physical_memory()
    if device == "cpu" and here is not None and needed > here:
        raise ValueError(
            f"its weights take {needed / 1e9:,.0f} GB, and this machine has {here / 1e9:,.0f} GB of memory"
        )
    initialize(model, torch.device(device), entry.link["seed"])
    return model
