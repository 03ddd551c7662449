"""Figures of results: points in, `matplotlib` figures out, as SVG text or PNG bytes.

A point is one SAE's `results.json` as `report.read` returns it. Nothing here touches pyplot, the
global settings or the clock: the same points give the same bytes on one version of matplotlib.
"""

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
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

Point = dict[str, Any]

# Okabe & Ito's palette without yellow, which vanishes on white; 7 colours and 15 markers have no
# common factor, so 105 labels differ in at least one of the two.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p", "h", "d", "8", (4, 1, 0))
LINES = ("-", "--", "-.", ":")
SIZE = (4.6, 3.1)  # inches, without the legend: legible at half a page and on a phone
MOST_NUMBERED = 30  # rows or columns of a heatmap whose cells are wide enough for a number
# Its lightness falls all the way from -1 to 1, so that the sign shows in grey and to any eye.
_COSINES = LinearSegmentedColormap.from_list(
    "cosines", [(0, "#FFEFA8"), (0.5, "#D6D6D6"), (0.75, "#5B8DB8"), (1, "#04223F")]
)
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
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


@dataclass(frozen=True)
class _Metric:
    title: str
    axis: str
    scale: float = 1.0
    include: float | None = None  # a value that the axis always shows
    least_margin: float = 0.01  # in the axis's units, where all values are equal


_METRICS = {
    "loss_recovered": _Metric(
        "Loss recovered against L0", "loss recovered, %", 100, least_margin=0.3
    ),
    "fvu": _Metric("Variance unexplained (FVU) against L0", "FVU", include=None),
    "gamma": _Metric("Shrinkage (γ) against L0", "γ, below 1 is shrinkage", include=1.0),
    "dead_share": _Metric(
        "Dead latents against L0", "dead latents, %", 100, include=0.0, least_margin=0.5
    ),
}
_HISTOGRAMS = {
    "log10_latent_density": ("Latent density", "log10 of the share of tokens a latent fires on"),
    "threshold": ("Thresholds", "threshold of each latent"),
    "b_gate": ("Gate bias", "b_gate of each latent"),
    "b_mag": ("Magnitude bias", "b_mag of each latent"),
    "r_mag": ("Magnitude rescaling", "r_mag of each latent (log scale factor)"),
    "b_enc": ("Encoder bias", "b_enc of each latent"),
}


def draw(points: Sequence[Point], labels: Sequence[str]) -> list[Drawing]:
    """Return every figure the points allow; `labels` gives the curves' order and styles."""
    with _settings():
        drawings = [_metric_drawing(points, labels, key) for key in _METRICS]
        drawings.append(_gap_drawing(points))
        known = {name for point in points for name in point["histograms"]}
        for name in [*_HISTOGRAMS, *sorted(known - set(_HISTOGRAMS))]:
            drawings.append(_histogram_drawing(points, labels, name))
    return [drawing for drawing in drawings if drawing]


def cosine_heatmap(title: str, measured: dict[str, Any], num_features: int) -> bytes:
    """Return a PNG of learned against true directions, the decoder's bias in a strip below.

    measured: what `toy.measure` returns. The heatmap's first `num_features` columns are features,
    the others composites.
    """
    heatmap = measured["heatmap"]
    cosines, bias = np.array(heatmap["cosines"]), np.array([heatmap["bias"]])
    rows, columns = cosines.shape
    numbered = max(rows, columns) <= MOST_NUMBERED
    cell = 0.3 if numbered else 8 / max(rows, columns)  # inches
    height, width = max(2.0, cell * rows), max(2.0, cell * columns)
    with _settings():
        figure = Figure((width + 1.7, height + 1.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=[height, 0.25], sharex=True)
        for axes, values in ((upper, cosines), (lower, bias)):
            axes.grid(visible=False)
            image = axes.imshow(
                values, cmap=_COSINES, vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
            )
            if num_features < columns:
                axes.axvline(num_features - 0.5, color="black", linewidth=1)
            if numbered:
                _number_cells(axes, values)
        figure.colorbar(image, ax=[upper, lower], label="cosine similarity", aspect=5 * height)
        title = "\n".join(_wrapped(title, round(9 * (width + 1)), 3))
        figure.suptitle(title, fontsize=8.5, parse_math=False)
        upper.set_ylabel("latent, in the order of matches")
        upper.tick_params(labelbottom=False)
        lower.set_yticks([0], [f"b_dec\nnorm {measured['b_dec_norm']:.2g}"])
        if numbered:
            dead = set(heatmap["dead"])
            upper.set_yticks(
                range(rows), [f"{n} dead" if n in dead else n for n in heatmap["latents"]]
            )
            names = [i if i < num_features else f"c{i - num_features}" for i in range(columns)]
            lower.set_xticks(range(columns), names)
        right = " | composites (c)" if num_features < columns else ""
        lower.set_xlabel(f"true features{right}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        return buffer.getvalue()


def _number_cells(axes: Any, values: Any) -> None:
    """Print the cosines that are not near zero; in black or white, whichever is legible."""
    for (row, column), value in np.ndenumerate(values):
        if abs(value) >= 0.05:
            text = f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")
            colour = "white" if value > 0.55 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)


def plain_ticks(low: float, high: float) -> list[float]:
    """Return ticks for a logarithmic axis from `low` to `high` (> 0), to be printed as numbers.

    Powers of ten, then 1-2-5, then finer, until four lie within; else evenly spaced ones.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def by_setting(points: Sequence[Point]) -> list[list[Point]]:
    """Group one label's points into those that differ in nothing but the seed, by growing L0.

    Points of one group have equal `settings`, or where none were recorded equal target L0 or else
    equal λ; a point about which nothing is recorded is a group of its own.
    """
    groups: dict[str, list[Point]] = {}
    for index, point in enumerate(points):
        known = [point["settings"], point["target_l0"], point["l1_coefficient"]]
        kind, setting = next(
            ((i, value) for i, value in enumerate(known) if value not in (None, {})), (3, index)
        )
        key = sorted(setting.items()) if isinstance(setting, dict) else setting
        groups.setdefault(repr((kind, key)), []).append(point)
    return sorted(groups.values(), key=lambda group: np.mean([point["l0"] or 0 for point in group]))


# --- figures --------------------------------------------------------------------------------------


def _metric_drawing(points: Sequence[Point], labels: Sequence[str], key: str) -> Drawing | None:
    """One metric against L0: a small mark per SAE, a line through each setting's mean."""
    metric = _METRICS[key]
    drawn = [point for point in points if point["l0"] and point[key] is not None]
    if not drawn:
        return None
    present = [label for label in labels if any(point["label"] == label for point in drawn)]
    figure, axes = _figure_with_legend(present, labels)
    shown = [] if metric.include is None else [metric.include]
    seeds = False
    for label in present:
        style = _style(labels.index(label))
        bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.9, "alpha": 0.7}
        small = {**style, "linestyle": "none", "markersize": 3, "alpha": 0.55}
        means: list[tuple[float, float]] = []
        for group in by_setting([point for point in drawn if point["label"] == label]):
            x = np.array([point["l0"] for point in group], dtype=float)
            y = np.array([point[key] for point in group], dtype=float) * metric.scale
            means.append((float(np.exp(np.log(x).mean())), float(y.mean())))
            shown += y.tolist()
            if len(group) > 1:
                seeds = True
                axes.plot(x, y, **small)
            if key == "gamma":
                ends = np.array([p["gamma_ci"] or [p["gamma"]] * 2 for p in group], dtype=float).T
                axes.errorbar(x, y, np.abs(ends - y), **bars)
                shown += ends.flatten().tolist()
            elif len(group) > 1:
                spread = [[means[-1][1] - y.min()], [y.max() - means[-1][1]]]
                axes.errorbar(*([value] for value in means[-1]), spread, **bars)
        axes.plot(*zip(*means), **style)
    _log_axis(axes, [point["l0"] for point in drawn])
    margin = 0.07 * (max(shown) - min(shown)) or metric.least_margin
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    axes.set_ylabel(metric.axis)
    caption = "Small marks are SAEs, the line joins the means over seeds. " if seeds else ""
    if key == "gamma":
        axes.axhline(1.0, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        caption += "Bars are 95 % intervals of single SAEs; the dashed line is no shrinkage. "
    elif seeds:
        caption += "Bars reach from the lowest to the highest seed. "
    if len(drawn) < len(points):
        missing = len(points) - len(drawn)
        caption += f"Not drawn, for want of a value: {missing} of {len(points)} SAEs."
    alt = f"{metric.title}, one curve each for {', '.join(present)}; the values are in the table."
    return _drawing(key, metric.title, alt, caption.strip(), figure)


# From dark to light, so that they differ in grey too; hatched where colours may not be seen.
_GAP_PARTS = {
    "dictionary": ("#0072B2", ""),
    "selection": ("#E69F00", "///"),
    "magnitude": ("w", ""),
}


def _gap_drawing(points: Sequence[Point]) -> Drawing | None:
    """One bar per SAE, in the order of the table: FVU, stacked of what it is due to."""
    drawn = [point for point in points if point["encoder_gap"]]
    if not drawn:
        return None
    figure = Figure((SIZE[0], 1.1 + 0.24 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(drawn))
    for part, (colour, hatch) in _GAP_PARTS.items():
        width = np.array([point["encoder_gap"][part] for point in drawn])
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "black"}
        axes.barh(range(len(drawn)), width, 0.7, left, label=part, linewidth=0.6, **style)
        left += width
    names = [_wrapped(p["label"], 24, 1)[0] + f", {_l0(p['encoder_gap'])}" for p in drawn]
    axes.set_yticks(range(len(drawn)), names, parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("FVU")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    title = "What the error is due to"
    caption = (
        "Magnitude: gone when the encoder’s latents get the best magnitudes. Selection: gone with "
        "the best latents that a search finds, as many per token. Dictionary: what remains then."
    )
    alt = f"{title}: FVU in three parts for {', '.join(names)}; the values are in report.json."
    return _drawing("encoder_gap", title, alt, caption, figure)


def _histogram_drawing(points: Sequence[Point], labels: Sequence[str], name: str) -> Drawing | None:
    """One panel per label: the SAE in the middle of its label's L0s, among those that have it."""
    chosen: list[Point] = []
    for label in labels:
        mine = [
            point
            for point in points
            if point["label"] == label
            and sum(point["histograms"].get(name, {"counts": []})["counts"])
        ]
        mine.sort(key=lambda point: point["l0"] or 0)
        chosen += mine[(len(mine) - 1) // 2 :][:1]
    if not chosen:
        return None
    title, axis = _HISTOGRAMS.get(name, (name, name))
    columns = min(2, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    headings = ["\n".join(_wrapped(point["label"], 30, 2)) for point in chosen]
    tallest = max(heading.count("\n") for heading in headings)
    height = SIZE[1] if rows == 1 else 0.5 + rows * (1.3 + 0.14 * tallest)
    figure = Figure((SIZE[0], height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, point, heading in zip(grid, chosen, headings):
        histogram = point["histograms"][name]
        share = np.array(histogram["counts"]) / sum(histogram["counts"]) * 100
        colour = _style(labels.index(point["label"]))["color"]
        axes.stairs(share, histogram["edges"], fill=True, color=colour)
        axes.set_title(f"{heading}\n{_l0(point)}", fontsize=7.5, parse_math=False)
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(chosen) - columns) : len(chosen)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(axis, fontsize=8.5, parse_math=False)
    figure.supylabel("share of latents, %", fontsize=8.5)
    who = ", ".join(f"{point['label']} ({_l0(point)})" for point in chosen)
    density = name == "log10_latent_density"
    caption = "Latents that never fire have no logarithm and are not in it." if density else ""
    return _drawing(f"histogram_{name}", title, f"Histograms of {axis}: {who}.", caption, figure)


def _l0(point: Point) -> str:
    return "L0 unknown" if point["l0"] is None else f"L0 {point['l0']:.1f}"


def _style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the label with this number; the marks are hollowed in white."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        "linewidth": 1.3,
        "markersize": 8 if MARKERS[index % len(MARKERS)] in ("*", (4, 1, 0)) else 5.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def _wrapped(label: str, width: int, lines: int) -> list[str]:
    return textwrap.wrap(label, width, max_lines=lines, placeholder="…") or [" "]


def _figure_with_legend(present: Sequence[str], labels: Sequence[str]) -> tuple[Figure, Any]:
    """A figure that grows downwards with its legend, so that the axes keep their size."""
    texts = [_wrapped(label, 60 if len(present) <= 4 else 26, 3) for label in present]
    widest = max(len(line) for lines in texts for line in lines)
    columns = max(1, min(len(present), 70 // (widest + 9)))
    rows = math.ceil(len(present) / columns)
    by_column = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    lines = max(sum(map(len, column)) for column in by_column)
    figure = Figure((SIZE[0], SIZE[1] + 0.16 * lines), layout="constrained")
    legend = figure.legend(
        [Line2D([], [], **_style(labels.index(label))) for label in present],
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
    return figure, figure.subplots()


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.05, 1.3 if low == high else 1.05)
    ticks = plain_ticks(low / margin, high * margin)
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.set_xlabel("L0, active latents per token")


# --- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _settings() -> Generator[None]:
    """Matplotlib's defaults and ours, whatever the user's own matplotlibrc says."""
    with (
        matplotlib.style.context("default"),
        matplotlib.rc_context(_SETTINGS),
        warnings.catch_warnings(),
    ):
        # A label in a script that the font lacks is boxes in the figure, whole in the table.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _drawing(name: str, title: str, alt: str, caption: str, figure: Figure) -> Drawing:
    name = re.sub(r"\W+", "_", name)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))

    def save(kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **options)
        return buffer.getvalue()

    png = save("png", dpi=200, metadata={"Software": None})
    svg = _inline(save("svg", metadata=nothing).decode(), name)
    return Drawing(name, title, alt, caption, svg, png)


def _inline(svg: str, name: str) -> str:
    """Return the <svg> element alone: scalable, without addresses, its ids unique to `name`."""
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\s(width|height)="[^"]*pt"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
