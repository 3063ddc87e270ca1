"""What a study cannot say: its size, text, seeds, learning rates, and what was not equal or not
measured alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from motifarch.study.document import Items, Section, decimals, named, number, plural, signed
from motifarch.study.findings import ALPHA, Study, Variant
from motifarch.study.statistics import CONFIDENCE, POWER, detectable_difference

# Tokens for each parameter at which compute is best spent: Hoffmann et al., arXiv 2203.15556.
_OPTIMAL = 20
_SOURCES = {"stdlib": "the source text of Python's standard library"}
# What can be made equal: what a variant's row calls it, and what people do.
COSTS = {
    "parameters": ("parameters", "parameters"),
    "operations": ("training_flops_per_token", "training operations a token"),
    "flops": ("training_flops_per_token", "training operations a token"),
    "kv_cache": ("kv_bytes_per_token", "key/value cache bytes a token"),
}


def limits(study: Study) -> Section:
    """The study's limits, each from its own figures; those that do not apply are left out."""
    every: tuple[Callable[[Study], str], ...] = (
        _size,
        _text,
        _seeds,
        _learning_rates,
        _heads,
        _costs,
        _end,
        _times,
        _lambda,
        _failed,
    )
    return Section("Limits", [Items([said for limit in every if (said := limit(study))])])


def _size(study: Study) -> str:
    parameters = {(v.name, v.size): v.row["parameters"] for v in study.variants}
    shares = [r["tokens"] / parameters[r["variant"], r["size"]] for r in study.finished if r.get("tokens")]
    said = f"Size: {millions(parameters.values())} parameters"
    if shares:
        tokens = millions(r["tokens"] for r in study.finished if r.get("tokens"))
        said += f" and {tokens} tokens, {_range(shares, 2)} for each parameter"
        said += f" (compute is best spent at about {_OPTIMAL}: arXiv 2203.15556)"
    return f"{said}. Another size or length may put the variants in another order."


def _text(study: Study) -> str:
    data = study.results["grid"].get("data") or {}
    sources = data.get("source") or [data.get("path") or "one data set"]
    said = f"Text: {named([_SOURCES.get(source, source) for source in sources])} alone"
    if data.get("tokenizer"):
        said += f", in the tokens of {data['tokenizer']}"
    elif data.get("source") and data.get("vocab_size"):
        said += f", in a vocabulary of {data['vocab_size']:,} tokens that was trained on it"
    if data.get("seq_len"):
        said += f", {data['seq_len']:,} tokens a sequence"
    return f"{said}. Losses in another vocabulary do not compare with these."


def _seeds(study: Study) -> str:
    """What so many seeds can show at all."""
    found = [c.paired for c in study.comparisons if c.paired and c.paired.difference.sd]
    said = f"Seeds: {plural(len(study.seeds), 'seed')} ({', '.join(map(str, study.seeds))})."
    if not found:
        return f"{said} Two seeds that finished for both variants are the fewest that give an interval or a test."
    halves = [p.difference.half for p in found if p.difference.half is not None]
    sd = float(np.median([p.difference.sd for p in found if p.difference.sd is not None]))
    n = int(np.median([p.difference.n for p in found]))
    alone, corrected = (detectable_difference(sd, n, alpha=ALPHA / m) for m in (1, len(found)))
    said += (
        f" Paired {CONFIDENCE:.0%} intervals reach {np.median(halves):.4f} nats to each side in the median "
        f"({min(halves):.4f} to {max(halves):.4f}); smaller differences are lost in them. A paired test of {n} seeds "
        f"finds a true difference of {alone:.4f} nats with {POWER:.0%} chance"
    )
    return said + (f", after correction one of {corrected:.4f}." if len(found) > 1 else ".")


def _learning_rates(study: Study) -> str:
    tried = study.results.get("sweep") or []
    rates = sorted({run["learning_rate"] for run in tried})
    transferred = any(v.row.get("learning_rate_from") == "transferred" for v in study.variants)
    carried = ", and was transferred to the larger models" if transferred else ""
    if len(rates) < 2:
        given = sorted({v.row["learning_rate"] for v in study.variants if v.row.get("learning_rate")})
        rate = f" ({' to '.join(f'{r:g}' for r in given[:: max(1, len(given) - 1)])})" if given else ""
        return (
            f"Learning rates: one was given for all variants{rate}{carried}, tuned for none; it may suit some better."
        )
    tokens, full = (millions(r["tokens"] for r in runs if r.get("tokens")) for runs in (tried, study.finished))
    seeds = sorted({run["seed"] for run in tried})
    said = (
        f"Learning rates: for each variant the best of {named([f'{r:g}' for r in rates])} in one short run each "
        f"({tokens} tokens{f' instead of {full}' if full else ''}, seed {named([str(s) for s in seeds])}){carried}. "
        f"The grid is coarse (steps of {max(b / a for a, b in pairwise(rates)):g} times), and a longer run may prefer "
        "another rate."
    )
    if edge := [study.title(v) for v in study.variants if v.row.get("learning_rate_at_edge")]:
        said += f" At an end of the grid: {named(edge)}; rates beyond it were not tried."
    return said


def _heads(study: Study) -> str:
    """The ratio is not all that differs between ratios."""
    group = study.main_group
    ratios = [v for v in study.ratios(group) if v.signal_heads and v.row["model"].get("intermediate_size")]
    noise = {v.row["model"].get("num_noise_heads") for v in ratios}
    if len({v.signal_heads for v in ratios}) < 2 or len(noise) != 1:
        return ""
    heads = [f"{v.signal_heads} in {v.label}" for v in ratios]
    others = [f"{v.label} {v.signal_heads}" for v in group if v.ratio is None and v.signal_heads]
    beside = f" ({', '.join(others)})" if others else ""
    first, last = ratios[0], ratios[-1]
    said = (
        f"Heads: every ratio has {plural(noise.pop(), 'noise head')}, so that the ratio sets the signal heads: "
        f"{named(heads)}{beside}."
    )
    widths = [v.row["model"]["intermediate_size"] for v in (first, last)]
    if widths[0] == widths[1]:
        return f"{said} Ratio and number of signal heads can't be told apart."
    return (
        f"{said} The feed-forward makes up for them, {widths[0]} wide in {first.label} and {widths[1]} in "
        f"{last.label}: ratio, signal heads and feed-forward width can't be told apart."
    )


def _costs(study: Study) -> str:
    """What was equal, and by how much the rest was not."""
    by = study.results["matching"]["by"]
    name = study.results["matching"].get("reference")
    chosen = [v for v in study.variants if v.name == name] or study.variants[:1]
    matched = _deviations(study, chosen, COSTS[by][0])
    largest = max(abs(share) for share, _ in matched)
    others = [_differ(_deviations(study, chosen, key), what) for k, (key, what) in COSTS.items() if k != by]
    said = f"Cost: {COSTS[by][1]} are equal, to {100 * largest:.2f}% of {chosen[0].label}'s"
    return f"{said}; {named(others)}."


def _deviations(study: Study, references: Sequence[Variant], key: str) -> list[tuple[float, str]]:
    """How a cost of each variant differs from that of the one it was matched to."""
    starts = {v.size: v.row[key] for v in references}
    return [(v.row[key] / starts[v.size] - 1, study.title(v)) for v in study.variants if v.size in starts]


def _differ(deviations: Sequence[tuple[float, str]], what: str) -> str:
    ends = [end for end in (min(deviations), max(deviations)) if abs(end[0]) >= 5e-4]
    if not ends:
        return f"{what} are equal too"
    return f"{what} differ by {' to '.join(f'{signed(100 * share, 1)}% ({who})' for share, who in ends)}"


def _end(study: Study) -> str:
    """By how much the validation loss fell in the last quarter of the tokens, mean over runs."""
    falls = []
    for run in study.finished:
        rows = [(tokens, loss) for tokens, _, loss in run.get("validation") or () if loss is not None]
        if rows and rows[0][0] <= 0.75 * run["tokens"]:
            before = np.interp(0.75 * run["tokens"], [tokens for tokens, _ in rows], [loss for _, loss in rows])
            falls.append(float(before) - run["validation_loss"])
    fall = float(np.mean(falls)) if falls else 0.0
    if fall <= 0:
        return ""
    return (
        f"Length: in the last quarter of training the validation loss still fell by {fall:.4f} nats on average; longer "
        "runs may end in another order."
    )


def _times(study: Study) -> str:
    starts = study.results.get("starts") or [study.results["environment"]]
    jobs = max(start.get("jobs") or 1 for start in starts)
    if jobs < 2:
        return ""
    cores = study.results["environment"].get("cores")
    where = f" on {plural(cores, 'core')}" if cores else ""
    return (
        f"Speeds: up to {jobs} runs went on side by side{where}, so training speed, decoding speed and loss against "
        "time were measured beside other runs."
    )


def _lambda(study: Study) -> str:
    negative = [
        (layer, f"{v.label} ({value:.3f})".replace("-", "−"))
        for v in study.main_group
        for layer, value in study.by_layer(v, "lambda")
        if value < 0
    ]
    if not negative:
        return ""
    layers = sorted({layer for layer, _ in negative})
    said = [f"in layer {n} of {named([who for layer, who in negative if layer == n])}" for n in layers]
    return f"Lambda: below zero on average {'; '.join(said)}. There the noise map is added instead of taken away."


def _failed(study: Study) -> str:
    missing = len(study.runs) - len(study.finished)
    if not missing:
        return ""
    return f"Runs: {missing} of {plural(len(study.runs), 'run')} did not finish; they are listed under Failed runs."


def millions(values: Iterable[float]) -> str:
    """The range of large counts, in millions; empty where there are none."""
    found = [v / 1e6 for v in values]
    return f"{_range(found)} million" if found else ""


def _range(values: Sequence[float], figures: int = 3) -> str:
    digits = decimals(values, figures)
    low, high = (number(v, digits) for v in (min(values), max(values)))
    return f"{max(values):.{figures}g}" if low == high else f"{low} to {high}"
