"""Means over seeds: what SAEs of one label and setting come to, and how far they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..results import Measure, setting_of
from .figures import by_setting
from .reading import Point


def means_over_seeds(
    points: Sequence[Point], labels: Sequence[str], measures: Sequence[Measure]
) -> list[dict[str, Any]]:
    """One entry for each label and setting: "label", "settings", "seeds" and, by the measure's key,
    [mean, standard deviation], of a sample (n - 1), None for one seed; None without a value.
    """
    return [
        {
            "label": label,
            "settings": setting_of(group[0]),
            "seeds": len(group),
            **{measure.key: _mean([point[measure.key] for point in group]) for measure in measures},
        }
        for label in labels
        for group in by_setting([point for point in points if point["label"] == label])
    ]


def _mean(values: Sequence[float | None]) -> list[float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return [float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None]


def mean_text(measure: Measure, mean: list[float | None] | None) -> str:
    """A mean and its standard deviation as people see them."""
    known = [measure.text(value) for value in mean or () if value is not None]
    return " ± ".join(known) or measure.text(None)
