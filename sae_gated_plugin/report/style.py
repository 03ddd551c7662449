"""How figures look: colours, axes, legends, SVG for the page."""

from __future__ import annotations

import contextlib
import io
import math
import re
import textwrap
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.style
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

# Okabe & Ito's palette with a violet in place of yellow, which vanishes on white; 8 colours and 15
# markers have no common factor, so 120 labels differ in at least one of the two.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#5D3A9B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p", "h", "d", "8", (4, 1, 0))
_MARKS = cycler(marker=MARKERS, markersize=[8 if m in ("*", (4, 1, 0)) else 5.5 for m in MARKERS])
_LINES = cycler(linestyle=("-", "--", "-.", ":")) * cycler(color=COLOURS)
#: Colour, marker and line of each label in turn.
STYLES = list(_LINES * len(MARKERS) + _MARKS * len(_LINES))
SIZE = (4.6, 3.1)  # inches, without the legend: legible at half a page and on a phone
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.5,
    "svg.fonttype": "path",  # the reader's machine needs no font of ours
    "svg.hashsalt": "sae-gated",
}


@dataclass(frozen=True)
class Drawing:
    """A figure as an <svg> element and as a PNG file, and what a page says about it."""

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    png: bytes


def figure_style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the label with this number."""
    return STYLES[index % len(STYLES)]


def wrapped_text(label: str, width: int, lines: int) -> list[str]:
    """A label in at most `lines` lines."""
    return textwrap.wrap(label, width, max_lines=lines, placeholder="…") or [" "]


def figure_with_panels(present: Sequence[str]) -> tuple[Figure, dict[str, Any]]:
    """A figure with a panel for each label, under its name: for more labels than colours."""
    columns = 3
    rows = math.ceil(len(present) / columns)
    names = {label: wrapped_text(label, 22, 2) for label in present}
    height = 0.5 + rows * (1.15 + 0.11 * max(map(len, names.values())))
    figure = Figure((SIZE[0], height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(grid, names.values()):
        axes.set_title("\n".join(name), fontsize=6.5, parse_math=False)
        axes.tick_params(labelsize=6.5, labelbottom=True)
    for axes in grid[len(present) :]:
        axes.set_visible(False)
    return figure, dict(zip(present, grid))


def figure_with_legend(
    present: Sequence[str], labels: Sequence[str]
) -> tuple[Figure, dict[str, Any]]:
    """A figure that grows downwards with its legend, so that the axes keep their size; each label's
    axes are the same.
    """
    texts = [wrapped_text(label, 60 if len(present) <= 4 else 26, 3) for label in present]
    widest = max(len(line) for lines in texts for line in lines)
    columns = max(1, min(len(present), 70 // (widest + 9)))
    rows = math.ceil(len(present) / columns)
    by_column = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    lines = max(sum(map(len, column)) for column in by_column)
    figure = Figure((SIZE[0], SIZE[1] + 0.16 * lines), layout="constrained")
    legend = figure.legend(
        [Line2D([], [], **figure_style(labels.index(label))) for label in present],
        ["curve"] * len(present),  # set below: a legend skips labels that begin with _
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=3.2,
        labelspacing=0.35,
    )
    for text, wrapped in zip(legend.get_texts(), texts):
        text.set_parse_math(False)
        text.set_text("\n".join(wrapped))
    return figure, dict.fromkeys(present, figure.subplots())


def log_axis(axes: Any, values: Sequence[float], most: int = 8) -> None:
    """A logarithmic x axis around `values`, with plain numbers at its ticks: about `most`."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.05, 1.3 if low == high else 1.05)
    low, high = low / margin, high * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = math.log10(high / low)
    subs = next((s for s in ((1, 2, 5), (1, 3)) if len(s) * decades < most), (1,))
    log = LogLocator(subs=subs, numticks=most)
    axes.xaxis.set_major_locator(log if high > 4 * low else MaxNLocator(min(4, most - 1)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


@contextlib.contextmanager
def settings_text() -> Generator[None]:
    """Matplotlib's defaults and ours, whatever the user's own matplotlibrc says."""
    with (
        matplotlib.style.context("default"),
        matplotlib.rc_context(_SETTINGS),
        warnings.catch_warnings(),
    ):
        # A label in a script that the font lacks is boxes in the figure, whole in the table.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_drawing(name: str, title: str, alt: str, caption: str, figure: Figure) -> Drawing:
    """A figure as a Drawing: SVG for the page, PNG beside it."""
    name = re.sub(r"\W+", "_", name)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=nothing)
    inline = _inline(svg.getvalue().decode(), name)
    return Drawing(name, title, alt, caption, inline, png.getvalue())


def _inline(svg: str, name: str) -> str:
    """Return the <svg> element alone: scalable, without addresses, its ids unique to `name`."""
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\s(width|height)="[^"]*pt"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
