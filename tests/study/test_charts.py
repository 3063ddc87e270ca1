"""Charts: well-formed, within their frame, with labels that can be told apart."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motifarch.study.charts import WIDTH, Dot, Interval, Series, by_ratio, heat_map, intervals, lines, luminance, shade
from motifarch.study.statistics import Estimate, estimate
from motifarch.study.svg import MARKERS, Scale, marker, round_labels, spread_out

SVG = "{http://www.w3.org/2000/svg}"


def parse(drawing: str) -> ElementTree.Element:
    """The drawing, if it is one that a browser reads."""
    root = ElementTree.fromstring(drawing)
    assert root.find(f"{SVG}title").text
    assert root.find(f"{SVG}desc").text
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


def test_lines_are_drawn_at_their_values_and_named() -> None:
    series = [Series("a & <b>", 0, [(0, 1.0), (10, 3.0)]), Series("c", 1, [(0, 2.0), (10, 2.0)]), Series("none", 2, [])]
    root = parse(lines("title", "what it shows", series, "tokens", "loss"))
    assert {"a & <b>", "c", "tokens", "loss"} <= set(texts(root))
    assert "none" not in texts(root)
    (first, second) = (
        [tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in root.iter(f"{SVG}polyline")
    )
    # Higher values lie higher, and the level line midway between.
    assert first[1][1] < second[0][1] == second[1][1] < first[0][1]
    assert second[0][1] == pytest.approx((first[0][1] + first[1][1]) / 2, abs=0.2)


def test_what_is_not_finite_or_above_the_top_is_left_out() -> None:
    points = [(0, 9.0), (1, math.nan), (2, 2.0), (3, 1.0)]
    root = parse(lines("title", "d", [Series("a", 0, points)], "x", "y", top=2.5))
    assert len(next(root.iter(f"{SVG}polyline")).get("points").split()) == 2
    assert "nan" not in lines("title", "d", [Series("a", 0, points)], "x", "y")


def test_intervals_and_dots_stand_within_the_drawing() -> None:
    wide, single = estimate([2.0, 2.4]), Estimate(2.1, 1)
    columns = [("softmax MHA", [Dot("a", 0, wide, [(0, 2.0), (1, 2.4)]), Dot("b", 0, single, [(0, 2.1)], hollow=True)])]
    rows = [Interval("GDA 4:1", 5, Estimate(-0.1, 3, 0.1, -0.3, 0.1), Estimate(-0.1, 3, 0.1, -0.2, 0.0))]
    for drawing in (by_ratio("t", "d", columns, "loss", joined=[]), intervals("t", "d", rows, "difference")):
        root = parse(drawing)
        height = float(root.get("viewBox").split()[3])
        for mark in [*root.iter(f"{SVG}circle"), *root.iter(f"{SVG}line")]:
            for name, limit in (("cx", WIDTH), ("x1", WIDTH), ("x2", WIDTH), ("cy", height), ("y1", height)):
                assert 0 <= float(mark.get(name, 0)) <= limit
        for move in re.findall(r"M[\d.]+ (-?[\d.]+)V(-?[\d.]+)", drawing):
            assert all(0 <= float(y) <= height for y in move)


def test_heat_maps_write_each_figure_and_leave_gaps() -> None:
    values = [[0.0, 1.0], [0.5, math.nan], [-0.5, -1.0]]
    drawing = heat_map("t", "d", values, ["128", "256", "512"], ["10%", "90%"], reach=1.0, write="{:.1f}".format)
    root = parse(drawing)
    cells = [t for t in root.iter(f"{SVG}text") if "cell" in t.get("class", "")]
    assert [t.text for t in cells] == ["0.0", "1.0", "0.5", "-0.5", "-1.0"]
    nothing, deep, half, below, deepest = [r.get("fill") for r in root.iter(f"{SVG}rect")]
    assert luminance(nothing) > luminance(half) > luminance(deep)
    assert luminance(nothing) > luminance(below) > luminance(deepest)
    # Blue above, orange below.
    assert [int(f[1:3], 16) > int(f[5:], 16) for f in (deep, half, below, deepest)] == [False, False, True, True]
    # Written light on dark and dark on light.
    assert [("on-dark" in t.get("class")) for t in cells] == [False, True, False, False, True]


def test_a_heat_maps_middle_is_what_it_is_told() -> None:
    drawing = heat_map("t", "d", [[20.0, 100.0, 0.0]], ["128"], ["1", "2", "3"], middle=20.0, reach=80.0, write=str)
    fills = [r.get("fill") for r in parse(drawing).iter(f"{SVG}rect")]
    assert fills == [shade(0.0), shade(1.0), shade(-0.25)]


def test_figures_stand_out_from_every_shade() -> None:
    """At least 4.5:1, black or white (WCAG 2, 1.4.3)."""
    for i in range(-100, 101):
        drawing = heat_map("t", "d", [[i / 100]], ["128"], ["10%"], reach=1.0, write=str)
        paper = luminance(shade(i / 100))
        ink = 1.0 if "on-dark" in drawing else 0.0
        low, high = sorted((paper, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_every_kind_of_series_has_a_mark_of_its_own() -> None:
    drawn = [re.sub(r'class="[^"]*"', "", marker(kind, 50.0, 50.0)) for kind in range(len(MARKERS))]
    assert len(set(drawn)) == len(MARKERS)


def test_better_and_worse_stay_within_the_drawing() -> None:
    for mean in (-0.2, 0.2):
        rows = [Interval("GDA 4:1", 5, Estimate(mean, 3, 0.1, mean - 0.01, mean + 0.01), None)]
        root = parse(intervals("t", "d", rows, "difference"))
        (worse,) = [t for t in root.iter(f"{SVG}text") if t.text == "worse →"]
        assert float(worse.get("x")) + 70 <= WIDTH


@given(st.lists(st.floats(0, 300), min_size=1, max_size=9))
def test_labels_keep_their_order_and_their_distance(places: list[float]) -> None:
    moved = spread_out(places, 20, 0, 400)
    order = sorted(range(len(places)), key=lambda i: places[i])
    gaps = [moved[b] - moved[a] for a, b in pairwise(order)]
    assert all(gap > 20 - 1e-9 for gap in gaps)
    assert -1e-9 <= min(moved) <= max(moved) <= 400 + 1e-9
    assert spread_out([0, 100, 200], 20, 0, 400) == [0, 100, 200]  # no more than needed


@given(st.floats(-1e3, 1e7), st.floats(1e-4, 1e7))
def test_ticks_have_labels_that_differ_and_are_right(low: float, width: float) -> None:
    ticks = Scale(low, low + width, 0, 1).ticks()
    labels = round_labels(ticks)
    assert len(set(labels)) == len(ticks)
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    for tick, label in zip(ticks, labels, strict=True):
        number = float(label.replace("−", "-").rstrip("kMG")) * units.get(label[-1], 1)
        assert number == pytest.approx(tick, rel=1e-6, abs=1e-9 * max(map(abs, ticks)))
