"""Figures of results in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report.figures import draw
from ..report.reading import read_results
from ..report.style import Drawing


def figures_of(results: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Draw results; ConfigError where they do not belong together."""
    with tempfile.TemporaryDirectory() as folder:
        for number, result in enumerate(results):
            (Path(folder) / f"{number:06d}").mkdir()
            (Path(folder) / f"{number:06d}" / "results.json").write_text(json.dumps(result))
        points, _ = read_results([folder])
    present = {point["label"] for point in points}
    labels = sorted(present, key=lambda label: (label != "gated", label != "standard", label))
    return draw(points, labels)
