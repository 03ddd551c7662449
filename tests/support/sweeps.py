"""What the tests of sweeps share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_gated_plugin.sweeps.folder import PointFolder
from sae_gated_plugin.sweeps.grid import Sweep, load_sweep


def places_of(mapping: dict[str, Any], folder: Path) -> list[PointFolder]:
    return [PointFolder(p, folder / "points" / p.name) for p in load_sweep(mapping).points]


def names(sweep: Sweep) -> list[str]:
    return [point.name for point in sweep.points]


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original = getattr(owner, name)

    def call(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, name, call)
    return calls
