"""The loss of a Hugging Face folder on prepared data's validation split."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import motifarch
from motifarch.data import PackedDataset
from motifarch.errors import UserError
from motifarch.inference.generate import load
from motifarch.progress import progress
from motifarch.tokenizer.loading import tokenizer_fingerprint
from motifarch.train.metrics import bits_per_byte
from motifarch.train.step import spread_rows


@torch.no_grad()
def validate(
    folder: Path, data: Path, *, limit: float | None = None, dtype: str = "auto", device: str | None = None
) -> dict[str, Any]:
    """The mean cross-entropy of a causal language model over validation sequences.

    Each document of a sequence is read on its own, as in training; log-probabilities are summed in
    float32, whatever the model computes in.

    Args:
        folder: a Hugging Face folder with the tokenizer that the data was prepared with.
        data: a folder made by ``motifarch data prepare``.
        limit: sequences, evenly spread, or below 1 a share of them; all by default.
        dtype: of the weights; "auto" leaves them as they are saved.
        device: default: the GPU if there is one.

    Returns:
        "loss" in nats/token, "bits_per_byte" by the whole split's bytes a token (None for data that
        does not say how many it has), and the number of "sequences" and "tokens" that were
        predicted.

    Raises:
        UserError: the folder or the data does not load, or they have different tokenizers.
    """
    dataset = PackedDataset.open(data, "validation")
    model, tokenizer = load(folder, dtype=dtype, device=device)
    if tokenizer_fingerprint(tokenizer) != dataset.tokenizer_fingerprint:
        raise UserError(
            f"{data} was prepared with another tokenizer than {folder} has; prepare its text with --tokenizer {folder}"
        )
    count = len(dataset) if limit is None else round(limit * len(dataset)) if limit < 1 else int(limit)
    rows = spread_rows([dataset], max(1, count))
    total, tokens = 0.0, 0
    with progress("validating", len(rows)) as advance:
        for _, row in rows:
            block = dataset[row]
            for document in torch.from_numpy(block.input_ids.astype("int64")).split(block.doc_lengths.tolist()):
                if len(document) > 1:
                    ids = document.to(model.device)
                    logits = model(ids[None, :-1], use_cache=False).logits[0]
                    total += float(F.cross_entropy(logits.float(), ids[1:], reduction="sum"))
                    tokens += len(ids) - 1
            advance()
    loss, text = total / tokens, dataset.bytes_per_token
    return {
        "motifarch": motifarch.__version__,
        "folder": str(folder),
        "data": str(data),
        "loss": loss,
        "bits_per_byte": bits_per_byte(loss, text) if text else None,
        "sequences": len(rows),
        "tokens": tokens,
    }
