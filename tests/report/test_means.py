"""Pages of SAEs on data of known features: means over seeds, and nothing about a model's loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.results_files import result

from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.report.page import write_report


def on_features(label: str, seed: int, f1: float, **changes: Any) -> dict[str, Any]:
    numbers = {"precision": 0.5, "recall": 0.25, "mcc": f1, "uniqueness": 1.0, "shrinkage": 0.75}
    nothing = dict.fromkeys(("loss_recovered", "nats_lost", "kl"))
    features = {"true_l0": 7.25, "num_features": 1024, "explained_variance": 0.875}
    data = {"model_name": "synthetic-abc", "dataset": "synthetic-abc", "split": None}
    whole = {**numbers, **nothing, **features, **data, "settings": {"k": 4}, **changes}
    return result(label, seed, 4.0, f1=f1, histograms={}, gamma_ci=None, **whole)


def test_means_and_standard_deviations_over_seeds(tmp_path: Path) -> None:
    saes = [on_features("gated", seed, f1) for seed, f1 in enumerate((0.5, 0.6, 0.7))]
    saes += [on_features("topk", 0, 0.4), on_features("topk", 1, 0.4, dead_share=0.0)]
    saes += [on_features("relu", 0, 0.3, mcc=None, dead_share=0.0)]
    for index, sae in enumerate(saes):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "results.json").write_text(json.dumps(sae))
    written = write_report([tmp_path], tmp_path / "page")
    assert written["sentences"] == written["comparisons"] == []
    gated, relu, topk = written["means"]
    assert (gated["label"], gated["settings"], gated["seeds"]) == ("gated", {"k": 4}, 3)
    assert gated["f1"] == pytest.approx([0.6, 0.1])
    assert gated["l0"] == [4.0, 0.0]
    assert topk["f1"] == [pytest.approx(0.4), 0.0]
    assert topk["dead_share"][0] == pytest.approx(0.0123456 / 2)
    assert (relu["f1"], relu["mcc"], relu["dead_share"]) == ([0.3, None], None, [0.0, None])
    names = [Path(figure).stem for figure in written["figures"]]
    assert names == ["f1", "mcc", "fvu", "gamma", "dead_share"]
    page = Path(written["page"]).read_text()
    assert "Sparse autoencoders on data of 1,024 known features" in page
    assert "<td>0.600 ± 0.100</td>" in page
    assert "<td>0.00%</td>" in page  # a mean of zero is a number
    assert "of which\n7.2 are active" in page
    for absent in ("loss recovered", "Loss recovered", "nats", "95 %", "not recorded"):
        assert absent not in page


def test_a_page_of_text_has_no_means(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(result()))
    written = write_report([tmp_path], tmp_path / "page")
    assert "means" not in written
    page = Path(written["page"]).read_text()
    assert "Means over seeds" not in page
    assert "loss recovered" in page


def test_features_and_text_do_not_go_together(tmp_path: Path) -> None:
    for name, sae in (("a", result()), ("b", on_features("gated", 0, 0.5))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(sae))
    with pytest.raises(ConfigError, match="Results of different models cannot be compared"):
        write_report([tmp_path], tmp_path / "page")
