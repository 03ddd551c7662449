"""SAELens's recommended architectures beside ours, as points of one sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class

from sae_gated_plugin.cli.tables import results_table
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.measure import evaluate as measuring
from sae_gated_plugin.measure.evaluate import evaluate
from sae_gated_plugin.metrics.decoder import coherence
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep


@pytest.mark.filterwarnings("ignore")
def test_batchtopk_matryoshka_and_jumprelu_are_points(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumprelu = {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "quadratic"}
    if not hasattr(get_sae_training_class("jumprelu")[1](d_in=1, d_sae=1), "target_l0"):
        pytest.skip("SAELens's jumprelu has target_l0 from 6.53 on")
    small_run["sae"] = {"d_in": 128, "d_sae": 256}
    small_run["sweep"] = {
        "eval_tokens": 2048,
        "curves": [
            {"architecture": "batchtopk", "k": 8},
            {"architecture": "matryoshka_batchtopk", "k": 8, "matryoshka_widths": [[32, 128, 256]]},
            {**jumprelu, "target_l0": 8, "l0_coefficient": 1},
            {"architecture": "gated", "target_l0": 8, "matryoshka_widths": [[32, 128]]},
            {
                "label": "control",
                "architecture": "gated",
                "control": ["frozen_decoder", "frozen_encoder", "soft_frozen"],
                "target_l0": 8,
            },
        ],
    }
    run_sweep(load_sweep(small_run), tmp_path)
    results = {
        path.parent.name: json.loads(path.read_text())
        for path in (tmp_path / "points").glob("*/results.json")
    }
    assert len(results) == 7
    for name, result in results.items():
        assert result["l0"] > 0, name
        saved = SAE.load_from_disk(tmp_path / "points" / name)
        details = saved.cfg.metadata.training_architecture_details
        if "matryoshka" in name or "widths" in name:
            assert details["matryoshka_widths"][-1] == 256, name
    for name in ("matryoshka_batchtopk", "gated"):
        (folder,) = (tmp_path / "points").glob(f"{name}*")
        assert_measured_width_by_width(folder)
    assert_rows_are_compared_once(folder, monkeypatch)
    assert {result["architecture"] for result in results.values()} == {"gated", "jumprelu"}


def assert_measured_width_by_width(run: Path) -> None:
    """A prefix is the SAE whose later decoder rows are zero; the last one is the SAE itself."""
    results = evaluate(run, tokens=1024, prefixes=True, coherence=False)
    prefixes = results["prefixes"]
    assert [prefix["width"] for prefix in prefixes] == [32, 128, 256]
    for key in ("l0", "fvu", "loss_recovered", "nats_lost"):
        assert prefixes[-1][key] == results[key]
    assert prefixes[0]["l0"] < prefixes[1]["l0"] < prefixes[2]["l0"]
    cut = SAE.load_from_disk(run)
    with torch.no_grad():
        cut.W_dec[32:] = 0
    expected = evaluate(cut, tokens=1024, coherence=False)
    for key in ("fvu", "gamma", "loss_recovered"):
        assert prefixes[0][key] == pytest.approx(expected[key], rel=1e-5)
    shown = Console(width=200, record=True)
    for part in results_table(results):
        shown.print(part)
    assert f"{prefixes[0]['fvu']:.4f}" in shown.export_text()


def assert_rows_are_compared_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.Tensor] = []

    def counted(W_dec: torch.Tensor, **options: Any) -> dict[str, float]:
        compared.append(W_dec)
        return coherence(W_dec, **options)

    monkeypatch.setattr(measuring, "coherence", counted)
    results = evaluate(run, tokens=1024, prefixes=True)
    assert len(compared) == 1
    assert 0 < results["coherence"] <= 1


def test_an_sae_without_prefixes_is_told_so(trained_run: Path) -> None:
    with pytest.raises(ConfigError, match="not trained with matryoshka_widths"):
        evaluate(trained_run, prefixes=True)
