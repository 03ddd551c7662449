"""Results saved as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


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
