"""The report in a real browser: what a reader's console, network, phone and printer would show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helpers.made_up_study import made_up_results
from motifarch.study.comparison import compare
from motifarch.study.report import write_report

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)}): apt-get install chromium")
    with playwright.sync_playwright() as started:
        # Containers run as root and with little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        launched = started.chromium.launch(executable_path=program, args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The largest of each kind: two activations, failed runs with awkward messages, a comparison;
    benchmarks.
    """
    failed = (("gda 2:1 poly_norm", 1), ("diff_v2 silu", 0))
    study = made_up_results(activations=("poly_norm", "silu"), failed=failed)
    for run in study["runs"]:
        for name in ("gain", "accuracy") if run["status"] == "finished" else ():
            # The longest contexts mislead: figures below zero and below chance.
            run["probe"][name][2] = [-0.4 * x if name == "gain" else 0.4 * x for x in run["probe"][name][2]]
    study["comparison"] = compare(study, made_up_results(shift=0.02))
    done = {"status": "finished", "reason": None, "seconds": 60.0}
    parts = [{**done, "name": "study", "title": "The study", "pictures": [], "content": study}]
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("study", "all")}
    for name in ("train_step", "decode", "attention"):
        content = json.loads((COMMITTED / f"{name}_cpu.json").read_text())
        shutil.copy(COMMITTED / f"{name}_cpu.png", folders["all"] / f"{name}.png")
        parts.append({**done, "name": name, "title": name, "pictures": [f"{name}.png"], "content": content})
    joined = {"kind": "all_benchmarks", "command": "made up", "environment": study["environment"], "parts": parts}
    write_report(study, folders["study"])
    write_report(joined, folders["all"])
    return {kind: folder / "report.html" for kind, folder in folders.items()}


@pytest.fixture(
    params=[("study", 390, "light"), ("study", 1280, "light"), ("all", 390, "dark")],
    ids=lambda p: f"{p[0]}, {p[1]} px, {p[2]}",
)
def page(request: pytest.FixtureRequest, browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    """The opened report, which knows what it printed and asked for."""
    kind, width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    opened.address, opened.messages, opened.requests = reports[kind].as_uri(), [], []
    opened.on("console", lambda message: opened.messages.append(message.text))
    opened.on("pageerror", lambda error: opened.messages.append(str(error)))
    opened.on("request", lambda asked: opened.requests.append(asked.url))
    opened.goto(opened.address, wait_until="networkidle")
    yield opened
    opened.close()


def test_it_says_nothing_to_the_console_and_asks_the_network_for_nothing(page: Any) -> None:
    assert page.messages == []
    assert [url for url in page.requests if not url.startswith("data:")] == [page.address]


def test_every_picture_has_words(page: Any) -> None:
    pictures = page.locator("svg, img")
    assert pictures.count() > 20
    wordless = pictures.evaluate_all(
        """found => found.filter(p => p.tagName === "IMG" ? !p.alt.trim() :
            p.getAttribute("role") !== "img" || !(p.getAttribute("aria-labelledby") || "").split(" ").every(
                id => (document.getElementById(id)?.textContent || "").trim())).map(p => p.outerHTML.slice(0, 200))"""
    )
    assert wordless == []
    ids = page.locator("[id]").evaluate_all("found => found.map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_nothing_sticks_out_of_the_page(page: Any) -> None:
    width = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Wide tables and benchmarks' pictures scroll inside their boxes; whatever else is drawn stays
    # within the window.
    outside = page.locator("h1, h2, h3, h4, p, li, pre, figure, svg, svg text, .box").evaluate_all(
        """(found, width) => found.filter(e => e.getBoundingClientRect().right > width + 1)
            .map(e => e.outerHTML.slice(0, 200))""",
        width,
    )
    assert outside == []
    # However far a table has to be scrolled, what it shows is read at once.
    captions = page.locator("caption span").evaluate_all(
        "(found, width) => found.filter(c => c.getBoundingClientRect().right > width + 1).map(c => c.textContent)",
        width,
    )
    assert captions == []


def test_texts_of_a_drawing_keep_clear_of_each_other(page: Any) -> None:
    overlapping = page.locator("svg").evaluate_all(
        """found => found.flatMap(svg => {
            const boxes = Array.from(svg.querySelectorAll("text")).map(t => [t.textContent, t.getBoundingClientRect()]);
            return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
                Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
                Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 0.4 * Math.min(p.height, q.height)
            ).map(([b]) => `${svg.querySelector("title").textContent}: ${a} / ${b}`));
        })"""
    )
    assert overlapping == []


def test_figures_of_heat_maps_fit_their_cells_and_stand_out_from_them(page: Any) -> None:
    """At least 4.5:1 for text (WCAG 2, 1.4.3), whatever the page's colours."""
    cells = page.locator("svg:has(.cell)").evaluate_all(
        """found => found.flatMap(svg => {
            const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(
                v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const rects = svg.querySelectorAll("rect"), texts = svg.querySelectorAll(".cell");
            return Array.from(texts, (t, i) => {
                const [p, q] = [t.getBoundingClientRect(), rects[i].getBoundingClientRect()];
                const [a, b] = [t, rects[i]].map(e => light(getComputedStyle(e).fill)).sort((x, y) => y - x);
                return [t.textContent, Math.min(p.left - q.left, q.right - p.right), (a + 0.05) / (b + 0.05)];
            });
        })"""
    )
    assert any(figure.startswith("−") for figure, _, _ in cells)
    assert [cell for cell in cells if cell[1] < 0] == []
    assert min(contrast for _, _, contrast in cells) >= 4.5


def test_the_answer_and_the_limits_come_before_the_figures(page: Any) -> None:
    heads = page.locator("h2, h3").all_inner_texts()
    assert heads.index("In short") < heads.index("Limits") < heads.index("Head ratio against loss")
    assert "of 3 head ratios" in page.locator("main").inner_text().split("Head ratio against loss")[0]


def test_headings_are_in_order_and_tables_say_what_their_heads_are_of(page: Any) -> None:
    levels = page.locator("h1, h2, h3, h4, h5, h6").evaluate_all("found => found.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("table:not(:has(caption))").count() == 0


def test_text_stands_out_from_the_page(page: Any) -> None:
    """At least 4.5:1 for text and 3:1 for lines and marks (WCAG 2, 1.4.3 and 1.4.11)."""
    contrasts = page.evaluate(
        """() => {
            const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(
                v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            const ratio = c => { const [a, b] = [light(c), paper].sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05); };
            const of = (query, property) => Array.from(document.querySelectorAll(query)).map(
                e => ratio(getComputedStyle(e)[property]));
            return {text: Math.min(...of("p, li, h1, h2, h3, td, th, a, figcaption, svg .tick, svg .axis", "color"),
                                   ...of("svg .tick, svg .axis", "fill")),
                    marks: Math.min(...of("svg .line", "stroke"), ...of("svg .solid, svg .label", "fill"))};
        }"""
    )
    assert contrasts["text"] >= 4.5
    assert contrasts["marks"] >= 3


def test_it_prints_whole(page: Any, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 688, "height": 1000})  # an A4 page between its margins, at 96 dots an inch
    clipped = page.locator(".box").evaluate_all(
        "found => found.filter(b => b.scrollWidth > b.clientWidth + 1).map(b => b.getAttribute('aria-label'))"
    )
    assert clipped == []
    printed = tmp_path / "report.pdf"
    page.pdf(path=printed, format="A4", prefer_css_page_size=True)
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") > 3
