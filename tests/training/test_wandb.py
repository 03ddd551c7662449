"""What wandb is told by a training, when, and what its failures cost."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from sae_lens import SAE
from safetensors.torch import load_file
from support.runs import run
from support.wandb_file import read_history, read_records

from sae_gated_plugin.errors import ConfigError, Interrupted, TrainingDiverged
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.run import resume
from sae_gated_plugin.training.wandb_log import artifact_name


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path
    wandb.teardown()  # it reads its settings once per process


@pytest.mark.parametrize(
    ("architecture", "histograms"),
    [("gated", {"b_gate", "b_mag", "r_mag"}), ("prolu", {"b_enc"})],
)
def test_wandb_offline(
    small_run: dict[str, Any], wandb_folder: Path, architecture: str, histograms: set[str]
) -> None:
    small_run["sae"]["architecture"] = architecture
    small_run["logger"] = {"wandb_log_frequency": 5, "eval_every_n_wandb_logs": 2}  # on by default
    run(small_run, wandb_folder / "run")
    assert wandb.run is None
    history = read_history(wandb_folder)
    steps = [row for row in history if "losses/overall_loss" in row]
    assert len(steps) == 4
    for row in steps:
        for name in ("gamma", "gamma_centered", "fvu", "l0", "dead_share"):
            assert isinstance(row[f"metrics/{name}"], int | float), name
        assert row["metrics/fvu"] == pytest.approx(1 - row["metrics/explained_variance"], rel=1e-3)
    logged = {key for row in history for key, value in row.items() if value == "histogram"}
    assert {f"weights/{name}._type" for name in histograms} <= logged


def test_wandb_disabled(
    small_run: dict[str, Any], wandb_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    del small_run["logger"]
    run(small_run, wandb_folder / "run")
    assert not list(wandb_folder.rglob("*.wandb"))
    assert (wandb_folder / "run" / "results.json").exists()


def test_wandb_run_ends_when_training_fails(poisoned: dict[str, Any], wandb_folder: Path) -> None:
    del poisoned["logger"]
    with pytest.raises(TrainingDiverged):
        run(poisoned, wandb_folder / "run", "training_tokens=40960")
    assert wandb.run is None


WANDB = {"wandb_log_frequency": 5, "eval_every_n_wandb_logs": 2}


def test_a_name_that_wandb_refuses_is_made_one_that_it_takes(
    small_run: dict[str, Any], wandb_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A local model is enough: its path is long, or has a space, or a letter outside ASCII."""
    model = wandb_folder / "my models" / ("größte " + "x" * 150)
    shutil.copytree(small_run["model_name"], model)
    small_run.update(model_name=str(model), logger=WANDB)
    run(small_run, wandb_folder / "run", "training_tokens=2048", "n_checkpoints=1")
    assert (wandb_folder / "run" / "results.json").exists()
    (file,) = wandb_folder.rglob("run-*.wandb")
    records = [record for record in read_records(file) if record.HasField("artifact")]
    artifacts = [record.artifact for record in records]
    models = [set(artifact.aliases) for artifact in artifacts if artifact.type == "model"]
    assert models == [{"latest"}, {"latest", "final_model"}]
    names = {artifact.name for artifact in artifacts}
    assert len(names) == 2
    assert all(re.fullmatch(r"sae_[A-Za-z0-9_.-]{1,124}", name) for name in names)
    assert "wandb is missing something" not in caplog.text


def test_artifact_names() -> None:
    assert artifact_name("sae_org/model_blocks.0_64") == "sae_org__model_blocks.0_64"
    long = [artifact_name("sae_" + "x" * 200 + name) for name in ("a", "b")]
    assert long[0] != long[1]
    assert artifact_name("sae_a b") != artifact_name("sae_a_b")
    wandb.Artifact(long[0] + "_log_feature_sparsity", type="model")


@pytest.mark.parametrize("method", ["log", "log_artifact", "finish"])
def test_a_wandb_that_fails_is_a_warning(
    small_run: dict[str, Any],
    wandb_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    options = ("training_tokens=10240", "n_checkpoints=1")
    small_run["logger"] = WANDB
    run(small_run, wandb_folder / "whole", *options)

    def fail(*_: Any, **__: Any) -> None:
        raise wandb.CommError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, method, fail)
        run(small_run, wandb_folder / "run", *options)
    wandb.finish()
    assert "CommError: the server is gone" in caplog.text
    assert (wandb_folder / "run" / "results.json").exists()
    whole, ours = (
        load_file(wandb_folder / name / "sae_weights.safetensors") for name in ("whole", "run")
    )
    assert all(torch.equal(whole[key], ours[key]) for key in whole)


def test_wandb_is_told_when_the_files_are_in_place(
    small_run: dict[str, Any], wandb_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run["logger"] = WANDB
    log_artifact, seen = wandb.Run.log_artifact, []

    def log(self: Any, artifact: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("aliases") == ["final_model"]:
            assert SAE.load_from_disk(wandb_folder / "run").cfg.d_sae == 256
            assert (wandb_folder / "run" / "runner_cfg.json").exists()
            seen.append("final")
        elif artifact.type == "model":
            (path,) = checkpoints.numbered(wandb_folder / "run" / "checkpoints")
            checkpoints.verify(path)
            seen.append("checkpoint")
        assert any("weights" in name or "sparsity" in name for name in artifact.manifest.entries)
        return log_artifact(self, artifact, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log_artifact", log)
    run(small_run, wandb_folder / "run", "training_tokens=4096", "n_checkpoints=1")
    assert seen == ["checkpoint", "final"]


def test_ctrl_c_while_wandb_uploads_the_end(
    small_run: dict[str, Any], wandb_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run["logger"] = WANDB
    with monkeypatch.context() as patch:
        patch.setattr(
            wandb.Run, "log_artifact", lambda *_, **__: signal.raise_signal(signal.SIGINT)
        )
        with pytest.raises(Interrupted, match="only measuring is left; go on with: sae-gated"):
            run(small_run, wandb_folder / "run", "training_tokens=2048")
    assert wandb.run is None
    assert resume(wandb_folder / "run")["training_tokens"] == 2048


def test_a_wandb_that_cannot_start_is_said_before_training(
    small_run: dict[str, Any], wandb_folder: Path
) -> None:
    small_run["logger"] = {**WANDB, "wandb_project": "a/b"}
    with pytest.raises(ConfigError, match=r"wandb cannot start: .*Nothing was trained.*--resume"):
        run(small_run, wandb_folder / "run", "training_tokens=2000000")
