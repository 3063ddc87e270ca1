"""The numbers that a plot shows, so that others can draw them in a style of their own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

COLUMNS = ("panel", "series", "x", "y", "low", "high")


def shown_data(figure: Figure) -> pd.DataFrame:
    """A row for each point of all labelled series: the panel (its title, or what its axes say), the
    series, x, y, and the ends of the interval around the one that has one.
    """
    rows = [row for axes in figure.axes if axes.get_visible() for row in _panel(axes)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _panel(axes: Axes) -> Iterator[tuple[Any, ...]]:
    panel = axes.get_title() or " over ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
    within = []
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            within.append(container.lines[0])
            for point in _with_interval(container):
                yield panel, container.get_label(), *point
    for line in axes.get_lines():
        label = str(line.get_label())
        if line in within or label.startswith("_"):  # matplotlib's name for what has none
            continue
        if line.get_transform() == axes.get_yaxis_transform():  # a line across
            yield panel, label, None, np.ravel(line.get_ydata())[0], None, None
            continue
        for x, y in np.array(line.get_data(), dtype=float).T:
            if np.isfinite([x, y]).all():  # what is not drawn is not shown
                yield panel, label, x, y, None, None
    for mesh in axes.collections:
        if isinstance(mesh, QuadMesh):
            columns, rows = ([t.get_text() for t in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis))
            for (i, j), value in np.ndenumerate(np.asarray(mesh.get_array()).reshape(len(rows), len(columns))):
                yield panel, rows[i], columns[j], value, None, None


def _with_interval(container: ErrorbarContainer) -> Iterator[tuple[float, float, float, float]]:
    line, _, bars = container.lines
    # (points, 2 ends, x and y), also where there is no point. Segments leave out points without a
    # place, paths keep them.
    ends = np.array([path.vertices for bar in bars for path in bar.get_paths()]).reshape(-1, 2, 2)
    along = 0 if container.has_xerr else 1
    for (x, y), both in zip(np.array(line.get_data(), dtype=float).T, ends[:, :, along], strict=True):
        if np.isfinite([x, y]).all():
            yield x, y, both.min(), both.max()
