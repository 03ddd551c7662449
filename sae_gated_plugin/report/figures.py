"""Figures of results: points in, `matplotlib` figures out, as SVG text or PNG bytes.

A point is one SAE's `results.json` as `reading.points_of` returns it. Nothing here touches pyplot,
the global settings or the clock: the same points give the same bytes on one version of matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..results import MEASURES, setting_of
from .reading import Point
from .style import (
    COLOURS,
    SIZE,
    Drawing,
    figure_style,
    figure_with_legend,
    figure_with_panels,
    log_axis,
    new_drawing,
    settings_text,
    wrapped_text,
)

#: Measures drawn against L0: title, a value that the axis always shows, and its least margin.
_METRICS: dict[str, tuple[str, float | None, float]] = {
    "f1": ("F1 of latents as detectors", None, 0.01),
    "mcc": ("MCC of latents and features", None, 0.01),
    "loss_recovered": ("Loss recovered", None, 0.3),
    "fvu": ("Variance unexplained (FVU)", None, 0.01),
    "gamma": ("Shrinkage (γ)", 1.0, 0.01),
    "dead_share": ("Dead latents", 0.0, 0.5),
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
    """Return every figure the points allow; `labels` gives the curves' order and styles.

    Of a single SAE there is no curve: a figure with one mark says less than the table.
    """
    with settings_text():
        curves = _METRICS if len(points) > 1 else ()
        drawings = [_metric_drawing(points, labels, key) for key in curves]
        drawings.append(_gap_drawing(points))
        known = {name for point in points for name in point["histograms"]}
        for name in [*_HISTOGRAMS, *sorted(known - set(_HISTOGRAMS))]:
            drawings.append(_histogram_drawing(points, labels, name))
    return [drawing for drawing in drawings if drawing]


def by_setting(points: Sequence[Point]) -> list[list[Point]]:
    """Group one label's points into those that differ in nothing but the seed, by growing L0.

    A point about whose setting nothing is recorded is a group of its own.
    """
    groups: dict[str, list[Point]] = {}
    for index, point in enumerate(points):
        setting = setting_of(point)
        groups.setdefault(repr(sorted(setting.items()) or index), []).append(point)
    return sorted(groups.values(), key=lambda group: np.mean([point["l0"] or 0 for point in group]))


def _metric_drawing(points: Sequence[Point], labels: Sequence[str], key: str) -> Drawing | None:
    """One metric against L0: a small mark per SAE, a line through each setting's mean."""
    drawn = [point for point in points if point["l0"] and point[key] is not None]
    if not drawn:
        return None
    title, always, least_margin = _METRICS[key]
    title = f"{title} against L0"
    present = [label for label in labels if any(point["label"] == label for point in drawn)]
    many = len(present) > len(COLOURS)  # then colours would repeat
    figure, panels = figure_with_panels(present) if many else figure_with_legend(present, labels)
    percent = MEASURES[key].format.endswith("%")
    scale = 100 if percent else 1
    beyond = _beyond(drawn, key)
    shown = [] if always is None else [always]
    seeds = False
    lines: list[Any] = []
    for label in present:
        axes = panels[label]
        style = figure_style(labels.index(label))
        bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.9, "alpha": 0.7}
        small = {**style, "linestyle": "none", "markersize": 3, "alpha": 0.55}
        means: list[tuple[float, float]] = []
        for group in by_setting([point for point in drawn if point["label"] == label]):
            x = np.array([point["l0"] for point in group], dtype=float)
            y = np.array([point[key] for point in group], dtype=float) * scale
            mean = float(np.exp(np.log(x).mean())), float(y.mean())
            means.append(mean)
            shown += [point[key] * scale for point in group if point not in beyond]
            if len(group) > 1:
                seeds = True
                axes.plot(x, y, **small)
            if key == "gamma":
                ends = np.array([p["gamma_ci"] or [p["gamma"]] * 2 for p in group], dtype=float).T
                axes.errorbar(x, y, np.abs(ends - y), **bars)
                shown += [end for p in group if p not in beyond for end in p["gamma_ci"] or []]
            elif len(group) > 1:
                axes.errorbar(*mean, [[mean[1] - y.min()], [y.max() - mean[1]]], **bars)
        axes.plot(*zip(*means), **style)
        lines.append(zip(*means))
    margin = 0.07 * (max(shown) - min(shown)) or least_margin
    for axes in dict.fromkeys(panels.values()):
        log_axis(axes, [point["l0"] for point in drawn], most=4 if many else 8)
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        if key == "gamma":
            axes.axhline(1.0, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    if many:
        for line in map(list, lines):
            for axes in panels.values():
                axes.plot(*line, color="#cfcfcf", linewidth=0.7, zorder=0.5)
    axis = MEASURES[key].title + (", %" if percent else "")
    if many:
        figure.supxlabel(MEASURES["l0"].title, fontsize=8.5)
        figure.supylabel(axis, fontsize=8.5)
    else:  # a figure's own label would lie on the legend
        panels[present[0]].set(xlabel=MEASURES["l0"].title, ylabel=axis)
    caption = "Small marks are SAEs, the line joins the means over seeds. " if seeds else ""
    if many:
        caption = f"One panel per label; grey: the others. {caption}"
    if key == "gamma":
        if any(point["gamma_ci"] for point in drawn):
            caption += "Bars are 95 % intervals of single SAEs. "
        caption += "The dashed line is no shrinkage. "
    elif seeds:
        caption += "Bars reach from the lowest to the highest seed. "
    if beyond:
        each = [f"{p['label']} ({_l0(p)}: {_value(p, key)})" for p in beyond]
        also = f" and {len(each) - 3} more" if len(each) > 3 else ""
        caption += f"Beyond the axis, to leave the others room: {', '.join(each[:3])}{also}. "
    if len(drawn) < len(points):
        missing = len(points) - len(drawn)
        caption += f"Not drawn, for want of a value: {missing} of {len(points)} SAEs."
    alt = f"{title}, one curve each for {', '.join(present)}; the values are in the table."
    return new_drawing(key, title, alt, caption.strip(), figure)


def _beyond(points: Sequence[Point], key: str) -> list[Point]:
    """At most a tenth of the points: those without which the axis is a third as long."""
    if key == "dead_share":  # where most are 0, those that are not are the news
        return []
    left = sorted(points, key=lambda point: point[key])

    def length(some: Sequence[Point]) -> float:
        return some[-1][key] - some[0][key]

    dropped: list[Point] = []
    beyond, shortest = 0, length(left)
    for _ in range(len(points) // 10):
        dropped.append(left.pop(0 if length(left[1:]) < length(left[:-1]) else -1))
        if 3 * length(left) < shortest:
            beyond, shortest = len(dropped), length(left)
    return dropped[:beyond]


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
    names = [wrapped_text(p["label"], 24, 1)[0] + f", {_l0(p['encoder_gap'])}" for p in drawn]
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
    return new_drawing("encoder_gap", title, alt, caption, figure)


def _histogram_drawing(points: Sequence[Point], labels: Sequence[str], name: str) -> Drawing | None:
    """One panel per label: the SAE in the middle of its label's L0s, among those that have it."""
    by_l0 = sorted(points, key=lambda point: point["l0"] or 0)
    filled = [np.count_nonzero(p["histograms"].get(name, {"counts": []})["counts"]) for p in by_l0]
    # One bin says that all latents are alike, which is drawn if it is all there is.
    least = min(2, max(filled, default=0))
    having = [point for point, bins in zip(by_l0, filled) if bins and bins >= least]
    chosen: list[Point] = []
    for label in labels:
        mine = [point for point in having if point["label"] == label]
        chosen += mine[(len(mine) - 1) // 2 :][:1]
    if not chosen:
        return None
    title, axis = _HISTOGRAMS.get(name, (name, name))
    columns = min(2, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    headings = ["\n".join(wrapped_text(point["label"], 30, 2)) for point in chosen]
    tallest = max(heading.count("\n") for heading in headings)
    height = SIZE[1] if rows == 1 else 0.5 + rows * (1.3 + 0.14 * tallest)
    figure = Figure((SIZE[0], height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, point, heading in zip(grid, chosen, headings):
        histogram = point["histograms"][name]
        share = np.array(histogram["counts"]) / sum(histogram["counts"]) * 100
        colour = figure_style(labels.index(point["label"]))["color"]
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
    return new_drawing(f"histogram_{name}", title, f"Histograms of {axis}: {who}.", caption, figure)


def _l0(point: Point) -> str:
    return "L0 unknown" if point["l0"] is None else f"L0 {MEASURES['l0'].text(point['l0'])}"


def _value(point: Point, key: str) -> str:
    return MEASURES[key].text(point[key]).replace("%", "\u00a0%")
