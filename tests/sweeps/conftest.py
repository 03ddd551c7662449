"""Sweeps that train in a few seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep


@pytest.fixture
def small_sweep(small_run: dict[str, Any]) -> dict[str, Any]:
    """Four points that train in a few seconds."""
    small_run["sae"] = {"d_in": 128, "d_sae": 256, "l1_warm_up_steps": 10}
    small_run["sweep"] = {
        "seeds": [0, 1],
        "eval_tokens": 2048,
        "curves": [
            {"label": "ours", "architecture": "gated", "l1_coefficient": 0.3},
            {"architecture": "topk", "k": [8]},
        ],
    }
    return small_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A finished sweep of four points and one that diverges, and what `run` returned."""
    from support.runs import SMALL_RUN

    mapping = copy.deepcopy(SMALL_RUN)
    mapping["sae"] = {"d_in": 128, "d_sae": 256, "l1_warm_up_steps": 10}
    mapping["sweep"] = {
        "seeds": [0, 1],
        "eval_tokens": 2048,
        "curves": [
            {"label": "ours", "architecture": "gated", "l1_coefficient": [0.3]},
            {"architecture": "topk", "k": [8]},
            {"label": "bad", "architecture": "standard", "l1_coefficient": 1e38},
        ],
    }
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep-file.yaml").write_text(to_yaml(mapping))
    return folder / "out", run_sweep(load_sweep(folder / "sweep-file.yaml"), folder / "out")
