"""The report's retrieval probe: maps of what shows anything, and words for what is at chance."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from helpers.made_up_study import made_up_results
from motifarch.study.document import Pictures, Section, Table, Text, decimals, number, signed
from motifarch.study.findings import Study
from motifarch.study.report_probe import probe


def asked(accuracy: float, gain: float, binding: float, *, errors: bool = True) -> Section:
    """The section of a study whose models retrieve so well on average, with noise between
    places.
    """
    results: dict[str, Any] = made_up_results()
    rng = np.random.default_rng(0)
    for run in results["runs"]:
        run["probe"]["overall"] = {}
        for name, mean, spread in (("accuracy", accuracy, 0.05), ("gain", gain, 0.004), ("binding", binding, 0.004)):
            noise = rng.normal(0, spread, (3, 5))
            run["probe"][name] = (mean + noise - noise.mean()).tolist()
            run["probe"]["overall"] |= {name: mean} | ({f"{name}_error": spread / 4} if errors else {})
    return probe(Study(results))


def maps(section: Section) -> dict[str, Pictures]:
    return {b.caption.split()[0]: b for b in section.blocks if isinstance(b, Pictures)}


def words(section: Section) -> str:
    return " ".join(b.text for b in section.blocks if isinstance(b, Text))


def test_accuracy_at_chance_is_said_and_not_drawn_and_gain_comes_first() -> None:
    section = asked(accuracy=0.2, gain=0.02, binding=0.0)
    assert list(maps(section)) == ["Gain"]
    assert "Binding and accuracy are at chance" in words(section)
    (table,) = [b for b in section.blocks if isinstance(b, Table)]
    assert table.columns == ("Variant", "Gain, nats", "Binding, nats", "Accuracy, %")


def test_accuracy_above_chance_is_drawn_behind_gain() -> None:
    section = asked(accuracy=0.5, gain=0.5, binding=0.4)
    assert list(maps(section)) == ["Gain", "Accuracy"]
    assert "chance:" not in words(section)


def test_accuracy_below_chance_is_no_retrieval() -> None:
    assert list(maps(asked(accuracy=0.1, gain=0.02, binding=0.01))) == ["Gain", "Binding"]


def test_a_little_above_chance_is_chance_where_so_few_questions_allow_it() -> None:
    # Errors are 0.0125; seven variants have a luckiest one.
    assert "accuracy are at chance" in words(asked(accuracy=0.225, gain=0.02, binding=0.0))
    assert "accuracy" not in words(asked(accuracy=0.245, gain=0.02, binding=0.02)).split("nats that the right name")[1]


def test_results_without_errors_say_nothing_about_chance() -> None:
    section = asked(accuracy=0.2, gain=0.02, binding=0.0, errors=False)
    assert "at chance" not in words(section)
    assert list(maps(section)) == ["Gain", "Accuracy"]


def test_maps_of_one_measure_have_cells_of_one_size() -> None:
    pictures = maps(asked(accuracy=0.2, gain=0.004, binding=0.0))["Gain"].pictures
    assert len({re.search(r'viewBox="[^"]*"', p.svg).group() for p in pictures}) == 1


def test_figures_have_as_many_decimals_as_their_size_takes() -> None:
    small, large = (maps(asked(0.2, gain, 0.0))["Gain"].pictures[0].svg for gain in (0.02, 2.0))
    for svg, digits in ((small, 3), (large, 2)):
        cells = re.findall(r'class="cell[^>]*>([^<]*)<', svg)
        assert len(cells) == 15
        assert all(re.fullmatch(rf"−?\d+\.\d{{{digits}}}", cell) for cell in cells), cells
    assert [decimals([x]) for x in (1234.0, 123.0, 12.3, 1.23, 0.123, 0.0123, 0.0)] == [0, 0, 1, 2, 3, 3, 2]
    assert [signed(x, 2) for x in (0.001, -0.001, 0.0, 0.02, -0.02)] == ["0.00", "0.00", "0.00", "+0.02", "−0.02"]
    assert [number(x, 2) for x in (-0.001, -0.02, 1234.5)] == ["0.00", "−0.02", "1,234.50"]


def test_below_zero_has_another_colour_than_above() -> None:
    svg = maps(asked(0.2, 0.0, 0.0))["Gain"].pictures[0].svg
    fills = re.findall(r'fill="(#\w+)"', svg)
    cells = re.findall(r'class="cell[^>]*>([^<]*)<', svg)
    colours = {"−": set(), "+": set()}
    for fill, cell in zip(fills, cells, strict=True):
        if cell.strip("−0."):
            red, blue = int(fill[1:3], 16), int(fill[5:], 16)
            colours["−" if cell.startswith("−") else "+"].add(red > blue)
    assert colours == {"−": {True}, "+": {False}}
