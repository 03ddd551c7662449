"""What version 0.1 wrote loads, goes on and is updated: `support/version_0_1` was made by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from sae_lens import SAE
from safetensors.torch import load_file
from support.local_hub import LocalHub
from support.runs import QUICKSTART
from typer.testing import CliRunner

from sae_gated_plugin.cli.commands import app
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.measure.evaluate import evaluate
from sae_gated_plugin.publish.hub import list_saes, push
from sae_gated_plugin.saes.load import load_sae
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.run import train

OLD = Path(__file__).parents[1] / "support" / "version_0_1"
WEIGHTS, RESULTS = "sae_weights.safetensors", "results.json"
MEASURED = ("l0", "fvu", "gamma", "loss_recovered", "kl", "dead_share", "coherence")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy; what is written into it stays out of the repository."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def measured(folder: Path) -> dict[str, Any]:
    """On this machine's copy of the model and the text; the metadata has another machine's path."""
    places = {"model_name": str(QUICKSTART / "model"), "dataset": str(QUICKSTART / "text")}
    results = evaluate(folder, tokens=2048, **places)
    return {key: results[key] for key in MEASURED}


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULTS).read_text())


@pytest.mark.parametrize("name", ["run", "prolu_run", "sweep/points/gated-seed0", "repository/run"])
def test_a_run_loads_and_measures_the_same(name: str) -> None:
    saved = results_of(OLD / name)
    sae = load_sae(OLD / name)
    assert sae.cfg.architecture() == saved["architecture"]
    tensors = load_file(OLD / name / WEIGHTS)
    assert sae.state_dict().keys() == tensors.keys()
    assert all(torch.equal(sae.state_dict()[key], value) for key, value in tensors.items())
    assert measured(OLD / name) == pytest.approx({key: saved[key] for key in MEASURED}, rel=1e-5)


def test_a_checkpoint_loads_and_is_measured() -> None:
    (checkpoint,) = checkpoints.numbered(OLD / "run" / "checkpoints")
    assert checkpoints.verify(checkpoint)["steps"] == 21
    sae = load_sae(checkpoint)
    assert isinstance(sae, SAE)
    assert 0 < measured(checkpoint)["fvu"] < 1


def test_an_interrupted_run_goes_on_as_if_it_had_been_trained_today(
    old: Path, tmp_path: Path
) -> None:
    folder = old / "interrupted_run"
    train(load_config(folder / "run.yaml"), tmp_path / "whole")
    done = CliRunner().invoke(app, ["train", "--resume", str(folder)])
    assert done.exit_code == 0, done.output
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    ours, today = results_of(folder), results_of(tmp_path / "whole")
    assert {key: ours[key] for key in MEASURED} == {key: today[key] for key in MEASURED}
    assert ours["training_tokens"] == 20_480


def test_a_sweep_does_what_is_missing(old: Path) -> None:
    point = old / "sweep" / "points" / "gated-seed0"
    before = {path.name: path.read_bytes() for path in point.iterdir()}
    results = run_sweep(load_sweep(old / "sweep.yaml"), old / "sweep")
    assert [result["label"] for result in results] == ["gated", "standard"]
    assert all(result["l0"] > 0 for result in results)
    assert {path.name: path.read_bytes() for path in point.iterdir()} == before
    assert load_sae(old / "sweep" / "points" / "standard-seed0").cfg.d_sae == 32


def test_a_published_repository_gets_another_run(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        path.relative_to(old / "repository").as_posix(): path.read_bytes()
        for path in (old / "repository").rglob("*")
        if path.is_file()
    }
    with LocalHub() as server:
        server.patch_client(monkeypatch, tmp_path / "home")
        server.create("tester/saes")
        server.commit("tester/saes", files)
        push([old / "prolu_run"], "tester/saes", license="mit")
        listed = {row["sae_id"]: row["architecture"] for row in list_saes("tester/saes")}
        after = server.files("tester/saes")
    assert listed == {"run": "gated", "prolu_run": "jumprelu"}
    assert after[f"run/{WEIGHTS}"] == files[f"run/{WEIGHTS}"]
    card = ModelCard(after["README.md"].decode())
    measures = str(card.data.to_dict()["model-index"])
    for name in ("run", "prolu_run"):
        assert f"`{name}`" in card.text
        assert f"FVU ({name})" in measures
