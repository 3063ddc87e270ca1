"""How long documents are in tokens, and how many bytes a token holds, by source."""

from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from motifarch.counted import counted
from motifarch.data.corpus import Corpus

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def source_lengths(tokenised: datasets.Dataset, corpus: Corpus, names: list[str]) -> list[dict[str, Any]]:
    """For each source: name, documents, tokens (those of beginning and end included), bytes (of the
    text in UTF-8), bytes_per_token, longest, and quantiles of the documents' lengths in tokens.
    """
    table = tokenised.data.table
    result, begin = [], 0
    for name, documents in zip(names, corpus.by_source, strict=True):
        rows = table.slice(begin, documents)
        begin += documents
        found: dict[str, Any] = {"source": name, "documents": documents}
        if documents:
            lengths = pc.list_value_length(rows.column("input_ids")).to_numpy()
            tokens, size = int(lengths.sum()), pc.sum(rows.column("bytes")).as_py()
            found |= {"tokens": tokens, "bytes": size, "bytes_per_token": round(size / tokens, 4)}
            values = np.quantile(lengths, _QUANTILES, method="nearest").tolist()
            found |= {"longest": int(lengths.max()), "quantiles": dict(zip(map(str, _QUANTILES), values, strict=True))}
        result.append(found)
    return result


def describe_lengths(found: dict[str, Any]) -> str:
    """A source in a line."""
    line = f"{found['source']}: {counted(found['documents'], 'document')}"
    if found["documents"]:
        few, median, many = (f"{found['quantiles'][quantile]:,}" for quantile in ("0.05", "0.5", "0.95"))
        line += f" of {few} / {median} / {many} tokens (5%, median, 95%), {found['bytes_per_token']:.2f} bytes a token"
    return line
