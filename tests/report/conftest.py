"""Results saved as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.results_files import AWKWARD, grid

from sae_gated_plugin.report.page import write_report


@pytest.fixture
def save(tmp_path: Path):
    """Write results as files of their own; return the folder."""

    def write(*values: Any, name: str = "results.json") -> Path:
        for value in values:
            folder = tmp_path / "runs" / str(len(list(tmp_path.rglob("*.json"))))
            folder.mkdir(parents=True)
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / name).write_text(text, encoding="utf-8")
        return tmp_path / "runs"

    return write


@pytest.fixture(scope="session")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 15 labels, some awkward, and 105 SAEs."""
    folder = tmp_path_factory.mktemp("crowded")
    labels = ["gated", "standard", *AWKWARD, *(f"label {i}" for i in range(8))]
    for number, value in enumerate(grid(labels, 7, 1)):
        (folder / f"{number}").mkdir()
        (folder / f"{number}" / "results.json").write_text(json.dumps(value))
    return Path(write_report([folder], folder / "out")["page"])
