"""The report of a study: its tables as Markdown, and the same as one HTML page with plots.

    motifarch benchmark report results.json --output DIR

Texts and tables are in `report.md.j2`, which both are made from; `report.html.j2` is the page
around it, which needs nothing from elsewhere. This file has what they call.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markdown_it import MarkdownIt

from motifarch.files import atomic_write
from motifarch.study import plots
from motifarch.study.analysis import Estimate, StudyResults, Variant, detectable_difference
from motifarch.study.designs import StudyDesigns
from motifarch.study.plots import Plot

HTML, MARKDOWN = "report.html", "report.md"
TABLE, REFERENCES, FIGURES = "table.tex", "references.bib", "figures"
PROBE = {"gain": ("Gain, nats", 1.0), "binding": ("Binding, nats", 1.0), "accuracy": ("Accuracy, %", 100.0)}
# Folders from the root on, before the name of a file.
_FOLDERS = re.compile(r"(?<![\w.…/:])/(?:[\w.+@~-]+/)+")


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Writes report.html and report.md, the plots as SVG and their numbers as CSV in figures/, the
    main table as LaTeX in table.tex, and what to cite in references.bib.

    Args:
        results: what a study's `results.json` holds. A `comparison` among it, from
            `motifarch.study.compare.compare_studies`, gets a section.
        folder: where to; made if need be.

    Raises:
        UserError: the results are of another kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Plot] = []
    files = {HTML: to_html(results, drawn), MARKDOWN: to_markdown(results), TABLE: to_latex(results)}
    files[REFERENCES] = (Path(__file__).parent / REFERENCES).read_text(encoding="utf-8")
    for plot in drawn:
        files |= {f"{FIGURES}/{plot.name}.svg": plot.svg, f"{FIGURES}/{plot.name}.csv": plot.data.to_csv(index=False)}
    (folder / FIGURES).mkdir(exist_ok=True)
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)


def to_markdown(results: Mapping[str, Any]) -> str:
    """The report without plots; raises as `write_report` does."""
    return _render(results, None)


def to_latex(results: Mapping[str, Any]) -> str:
    """The main table, which takes LaTeX's package booktabs; raises as `write_report` does."""
    study = StudyResults(results)
    rows = []
    for group in study.groups():
        for v in group:
            c = study.comparison(v, study.reference(group))
            rows.append(
                {
                    "Size": v.size,
                    "Attention": v.label,
                    "Activation": v.activation,
                    "Parameters": number(v.row["parameters"], 0),
                    "MFLOPs per token": number(v.row["training_flops_per_token"] / 1e6, 2),
                    "Cache, bytes per token": number(v.row["kv_bytes_per_token"], 0),
                    "Loss": with_interval(study.loss(v)),
                    f"Against {study.reference(group).label}": with_interval(c.difference if c else None, sign=True),
                    "p (Holm)": p_value(c.p_holm if c else None),
                }
            )
    written: str = pd.DataFrame(rows).fillna("–").to_latex(index=False, escape=True)
    return written.replace("±", "$\\pm$").replace("−", "$-$")


def to_html(results: Mapping[str, Any], kept: list[Plot] | None = None) -> str:
    """The report as a page, plots inlined as SVG; raises as `write_report` does.

    Args:
        results: what a study's `results.json` holds.
        kept: gets the page's plots, in their order.
    """
    drawn: list[tuple[Plot, str]] = []
    text = _render(results, drawn)
    if kept is not None:
        kept += [plot for plot, _ in drawn]
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    figures = [f"<figure>{plot.svg}<figcaption>{caption}</figcaption></figure>" for plot, caption in drawn]
    body = re.sub(r"<p>@plot (\d+)@</p>", lambda found: figures[int(found[1])], body)
    body = body.replace("<table>", '<div class="box" tabindex="0"><table>').replace("</table>", "</table></div>")
    titles = re.findall(r"<h2>(.*)</h2>", body)
    for i, title in enumerate(titles):
        body = body.replace(f"<h2>{title}</h2>", f'<h2 id="section-{i}">{title}</h2>')
    return _environment().get_template("report.html.j2").render(body=body, titles=titles)


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=ChainableUndefined,  # results of before a field was there have no such field
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # what is not ours in it is escaped where Markdown becomes HTML
    )
    for tool in (number, percent, with_interval, p_value, span, listed, header, row, short_error):
        found.filters[tool.__name__] = tool
    found.filters["median"] = lambda values: float(np.median(list(values)))
    found.globals["detectable"] = detectable_difference
    return found


def _render(results: Mapping[str, Any], drawn: list[tuple[Plot, str]] | None) -> str:
    """The Markdown; plots are drawn into a list, or left out where there is none."""
    study = StudyResults(results)
    probe: dict[str, Any] = next((run["probe"] for run in study.finished if run.get("probe")), {})
    # Of results that say so, those outside the embedding.
    parameters = {(v.name, v.size): v.row["parameters"] - v.row.get("embedding_parameters", 0) for v in study.variants}
    at_chance = [key for key in PROBE if study.above_chance(key) == []]
    shown = {key: words for key, words in PROBE.items() if key in probe and key not in at_chance}
    fitted = any("learning_rate_interval" in v.row for v in study.variants)
    tried = {(run["variant"], run["size"], run["learning_rate"]): run for run in results.get("sweep") or ()}
    rates = sorted({rate for _, _, rate in tried})

    def plot(name: str, caption: str, *args: Any) -> str:
        if drawn is None or not (drawing := plots.draw(getattr(plots, name), study, *args)):
            return ""
        drawn.append((drawing, caption))
        return f"@plot {len(drawn) - 1}@"

    text = (
        _environment()
        .get_template(f"{MARKDOWN}.j2")
        .render(
            study=study,
            designs=StudyDesigns(study),
            results=results,
            page=drawn is not None,
            plot=plot,
            tokens_per_parameter=[r["tokens"] / parameters[r["variant"], r["size"]] for r in study.finished],
            outside="embedding_parameters" in study.variants[0].row,
            probe=probe,
            probe_names=[name for name, _ in shown.values()],
            probe_rows=by_variant(study, [study.retrieval(key, unit) for key, (_, unit) in shown.items()]),
            at_chance=at_chance,
            attention_rows=partial(attention_rows, study),
            titles=lambda variants: [study.title(v) for v in variants],
            speed_rows=lambda measures: by_variant(
                study, [[study.estimate(v, "speed", name, unit=u) for v in study.variants] for name, u in measures]
            ),
            environment=list(_flat(results["environment"])),
            rates=[f"{rate:g}" for rate in rates],
            rate_rows=[
                _rates(study.title(v), v.row, [tried.get((v.name, v.size, r)) for r in rates], fitted)
                for v in study.variants
            ],
            fitted=fitted,
            rate_trend=rate_trend(study),
            lengths=sorted({(r["size"], r.get("steps") or 0, r.get("tokens") or 0) for r in study.finished}),
            settings=yaml.safe_dump(results["grid"], sort_keys=False, allow_unicode=True, width=100).rstrip(),
        )
    )
    return "\n\n".join(map(_wrap, re.split(r"\n{2,}", text.strip()))) + "\n"


def _wrap(block: str) -> str:
    """A paragraph or list in lines of 100 columns; tables, code and headings as they are."""
    if block.startswith(("|", "#", "```")):
        return block
    items = [" ".join(item.split()) for item in re.split(r"\n(?=- )", block)]
    return "\n".join(
        textwrap.fill(item, 100, subsequent_indent="  " * item.startswith("- "), break_on_hyphens=False)
        for item in items
    )


def by_variant(study: StudyResults, columns: Sequence[Sequence[Estimate | None]]) -> list[list[str]]:
    """Rows of a table, each column with the decimals that its largest mean takes."""
    written = []
    for column in columns:
        digits = decimals(e.mean for e in column if e)
        written.append([with_interval(e, digits) for e in column])
    return [[study.title(v), *cells] for v, *cells in zip(study.variants, *written, strict=True)]


def attention_rows(study: StudyResults, variants: Sequence[Variant], labels: Mapping[str, str]) -> Iterator[list[str]]:
    """Attention statistics, means over layers, each with the decimals that its largest takes."""
    for name, label in labels.items():
        layers = [[y for _, y in study.by_layer(v, name)] for v in variants]
        means = [float(np.mean(values)) if values else None for values in layers]
        if any(mean is not None for mean in means):
            yield [label, *(number(mean, decimals(means)) for mean in means)]
    spikes = [study.estimate(v, "attention", "gradient_norm_spikes") for v in variants]
    yield ["Gradient norm spikes in a run", *(number(s.mean if s else None, 1) for s in spikes)]


def rate_trend(study: StudyResults) -> dict[str, Any]:
    """How fitted learning rates go from the smallest size to the largest: the names of both, the
    factor of each variant that has a fit at both, and how many of their intervals overlap.
    """
    by_parameters = sorted(study.variants, key=lambda v: v.row["parameters"])
    sizes = [by_parameters[0].size, by_parameters[-1].size] if by_parameters else []
    fits = [{v.name: v.row for v in study.of_size(s) if "learning_rate_interval" in v.row} for s in sizes]
    if len(set(sizes)) < 2:
        return {"sizes": sizes, "factors": [], "overlapping": 0}
    both = [(fits[0][name], fits[1][name]) for name in fits[0] if name in fits[1]]
    return {
        "sizes": sizes,
        "factors": [large["learning_rate"] / small["learning_rate"] for small, large in both],
        "overlapping": sum(_overlap(*(row["learning_rate_interval"] for row in pair)) for pair in both),
    }


def _overlap(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    (low, high), (other_low, other_high) = ((low or 0.0, high or math.inf) for low, high in (one, other))
    return low <= other_high and other_low <= high


def _rates(
    title: str, chosen: Mapping[str, Any], tried: Sequence[Mapping[str, Any] | None], with_intervals: bool
) -> list[str]:
    losses = [
        number(run["validation_loss"]) if run and run.get("validation_loss") else (run and run["status"]) or "–"
        for run in tried
    ]
    rate = chosen["learning_rate"]
    interval = chosen.get("learning_rate_interval")
    ends = " to ".join("–" if end is None else f"{end:.2g}" for end in interval) if interval else "–"
    return [
        title,
        *losses,
        f"{rate:.3g}" if rate else "–",
        *([ends] if with_intervals else []),
        chosen["learning_rate_from"] or "–",
    ]


def decimals(values: Iterable[float | None], figures: int = 3) -> int:
    """Decimals, from none to three, that give the largest value so many significant figures."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return min(max(figures - 1 - math.floor(math.log10(largest)), 0), 3) if largest else figures - 1


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A figure, with a plus if asked for; one that is rounded to 0 has no sign."""
    if value is None:
        return "–"
    written = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    return written.replace("-", "−") if re.search("[1-9]", written) else written.lstrip("+-")


def percent(share: float | None, digits: int = 2) -> str:
    """A relative difference."""
    return "–" if share is None else f"{number(100 * share, digits, sign=True)}%"


def with_interval(estimate: Estimate | None, digits: int = 4, sign: bool = False) -> str:
    """A mean with half of its interval."""
    if estimate is None:
        return "–"
    return number(estimate.mean, digits, sign) + (f" ± {number(estimate.half, digits)}" if estimate.half else "")


def p_value(value: float | None) -> str:
    """A p value."""
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def span(values: Iterable[float], unit: float = 1.0, figures: int = 3, digits: int | None = None) -> str:
    """The range of some values, in a unit."""
    found = [value / unit for value in values] or [0.0]
    places = decimals(found, figures) if digits is None else digits
    low, high = (number(v, places) for v in (min(found), max(found)))
    return f"{max(found):.{figures}g}" if low == high else f"{low} to {high}"


def listed(items: Iterable[object], last: str = " and ") -> str:
    """A list in words: "a, b and c"."""
    words = list(map(str, items))
    return last.join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def short_error(error: str | None, limit: int = 400) -> str:
    """The last lines of an error, where the reason is, without the machine's folders."""
    said = _FOLDERS.sub("…/", " ".join((error or "–").split()))
    return said if len(said) <= limit else f"… {said[-limit:]}"


def header(columns: Sequence[str], caption: str, words: int = 1) -> str:
    """The beginning of a Markdown table, whose first columns are words."""
    marks = [":--" if i < words else "--:" for i in range(len(columns))]
    return f"**{caption}**\n\n{row(columns)}\n{row(marks)}"


def row(cells: Iterable[object], strong: bool = False) -> str:
    """A row of a Markdown table, in bold or not."""
    written = [" ".join(str(cell).split()).replace("|", "\\|").replace("<", "\\<") for cell in cells]
    return "| " + " | ".join(f"**{cell}**" if strong and cell else cell for cell in written) + " |"


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (name, value) of all that is known of where and with what something ran."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        elif name.endswith("_bytes") and isinstance(value, int):
            yield f"{prefix}{name.removesuffix('_bytes')}", f"{value / 2**30:.1f} GiB"
        elif value not in (None, []) and name != "command":
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
