"""The report of a study, or of every benchmark, from results as JSON has them: one HTML page, and
it in Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motifarch.errors import UserError
from motifarch.study import comparison
from motifarch.study.benchmark_figures import aims, tables
from motifarch.study.document import Block, Code, Document, Picture, Section, Table, Text, plural
from motifarch.study.findings import Study
from motifarch.study.report_answer import answer
from motifarch.study.report_curves import curves
from motifarch.study.report_html import to_html
from motifarch.study.report_limits import limits
from motifarch.study.report_losses import differences, losses
from motifarch.study.report_markdown import to_markdown
from motifarch.study.report_measures import attention, costs
from motifarch.study.report_probe import probe
from motifarch.study.report_record import environment_table, failures, matching, reproduction, short_error
from motifarch.study.report_summary import summary

HTML, MARKDOWN = "report.html", "report.md"


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Writes report.html and report.md.

    Args:
        results: what a study's ``results.json`` or the ``all.json`` of ``motifarch benchmark all``
            holds. A ``comparison`` among it, from :func:`motifarch.study.comparison.compare`, gets
            a section.
        folder: where to; made if need be. Pictures that ``all.json`` names lie there too.

    Raises:
        UserError: the results are of neither kind.
    """
    document = make_document(results, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((HTML, to_html(document)), (MARKDOWN, to_markdown(document, page=HTML))):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(folder / name)


def make_document(results: Mapping[str, Any], folder: Path) -> Document:
    """The report before it is written; see :func:`write_report`."""
    kind = results.get("kind")
    if kind == comparison.STUDY:
        study = Study(results)
        lead, more = answer(study, study.main_group)
        return Document("Which head ratio is best?", lead, _study_sections(study), more)
    if kind == comparison.ALL:
        return _all_benchmarks(results, folder)
    raise UserError(f"results of kind {kind!r} have no report; give a study's results.json or an all.json")


def _study_sections(study: Study) -> list[Section]:
    moved = study.results.get("comparison")
    sections: list[Section | None] = [
        summary(study),
        limits(study),
        comparison.section(moved) if moved else None,
        losses(study),
        differences(study),
        curves(study),
        probe(study),
        attention(study),
        costs(study),
        matching(study),
        failures(study),
        reproduction(study),
    ]
    return [section for section in sections if section is not None]


def _all_benchmarks(results: Mapping[str, Any], folder: Path) -> Document:
    parts = results["parts"]
    done = [p for p in parts if p["status"] == "finished"]
    rows = [
        (p["title"], p["status"].replace("_", " "), _duration(p), short_error(p.get("reason") or "")) for p in parts
    ]
    overview = Section(
        "What ran",
        [
            Table("Benchmarks", ("Benchmark", "Outcome", "Took", "Reason"), rows, 4),
            Code(str(results["command"])),
            environment_table(results["environment"]),
        ],
    )
    sections = [overview]
    if results.get("comparison"):
        sections.append(comparison.section(results["comparison"]))
    for part in done:
        if part["content"].get("kind") == comparison.STUDY:
            study = Study(part["content"])
            told = [Text(text) for text in answer(study, study.main_group) if text]
            sections.append(Section(part["title"], told, _study_sections(study)))
        else:
            sections.append(_benchmark(part, folder))
    environment = results["environment"]
    machine = environment["cpu"] if environment["device"] == "cpu" else environment["device"]
    date = environment["date"][:10]
    lead = f"{len(done)} of {plural(len(parts), 'benchmark')} ran on {machine}, {date}."
    return Document("Benchmarks", lead, sections)


def _duration(part: Mapping[str, Any]) -> str:
    seconds = part.get("seconds")
    return "–" if seconds is None else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _benchmark(part: Mapping[str, Any], folder: Path) -> Section:
    content = part["content"]
    blocks: list[Block] = []
    if (content.get("settings") or {}).get("quick"):
        blocks.append(Text("Tiny sizes (--quick): this proves that the benchmark runs, and measures nothing."))
    found = tables(content)
    for name in part.get("pictures") or ():
        path = folder / name
        if path.is_file():
            where = "the tables below" if found else "its JSON file"
            told = f"{part['title']}: bars or lines for each contender and size; the figures are in {where}."
            blocks.append(Picture(f"{part['title']}, as its benchmark drew it", told, png=path.read_bytes(), file=name))
    blocks += found
    if judged := aims(content):
        blocks.append(judged)
    left_out = [f"{name}: {reason}" for name, reason in (content.get("left_out") or {}).items()]
    if left_out:
        blocks.append(Text(f"Left out: {'; '.join(left_out)}.", note=True))
    blocks.append(Code(str(content["environment"]["command"])))
    return Section(part["title"], blocks)
