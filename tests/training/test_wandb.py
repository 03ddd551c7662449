"""What wandb is told by a training, when, and what its failures cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from sae_lens import SAE
from sae_lens.training._interruption import interrupt_callback
from safetensors.torch import load_file
from support.process import Process
from support.runs import run
from support.wandb_file import read_history, read_records, read_summary

from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.errors import ConfigError, Interrupted, TrainingDiverged
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep
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


@pytest.mark.parametrize("handler", [signal.default_int_handler, interrupt_callback])
def test_ctrl_c_while_wandb_uploads_the_end(
    small_run: dict[str, Any],
    wandb_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    handler: Any,
) -> None:
    """A runner of SAELens may have left its own handler behind, earlier in this process."""
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, handler)
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


def test_there_is_one_lambda_the_one_that_was_reached(
    small_run: dict[str, Any], wandb_folder: Path
) -> None:
    small_run["logger"] = WANDB
    results = run(small_run, wandb_folder / "run", "sae.target_l0=20", "sae.l1_coefficient=0.5")
    rows = [row for row in read_history(wandb_folder) if "losses/overall_loss" in row]
    assert not any("metrics/l1_coefficient" in row for row in rows)
    assert rows[-1]["details/l1_coefficient"] == pytest.approx(results["l1_coefficient"], rel=0.1)
    assert results["l1_coefficient"] > 0.6


HELD_OUT = ("l0", "loss_recovered", "kl", "gamma", "dead_share", "l1_coefficient")


def test_held_out_results_are_in_the_summary(small_run: dict[str, Any], wandb_folder: Path) -> None:
    small_run["logger"] = WANDB
    results = run(small_run, wandb_folder / "run")
    assert wandb.run is None
    summary = read_summary(wandb_folder)
    for key in HELD_OUT:
        assert summary[f"held_out/{key}"] == pytest.approx(results[key]), key
    ends = [summary[f"held_out/gamma_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx(results["gamma_ci"])


def test_held_out_results_of_a_sweep_have_their_points_name(
    small_run: dict[str, Any], wandb_folder: Path
) -> None:
    curves = [{"label": name, "architecture": name} for name in ("gated", "relu")]
    small_run.update(sweep={"curves": curves, "eval_tokens": 2048}, logger=WANDB)
    sweep = load_sweep(small_run, ["training_tokens=10240"])
    results = run_sweep(sweep, wandb_folder / "sweep")
    assert wandb.run is None
    summary = read_summary(wandb_folder)
    for point in results:
        for key in HELD_OUT:
            shown = summary[f"{point['label']}-seed0/held_out/{key}"]
            assert shown == pytest.approx(point[key]), key


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_what_is_measured_after_a_kill_is_in_the_summary(
    command: str, small_run: dict[str, Any], wandb_folder: Path
) -> None:
    """Killed when all is trained and nothing measured; the same command measures."""
    small_run.update(logger=WANDB, training_tokens=10_240)
    if command == "sweep":
        small_run["sweep"] = {"curves": [{"architecture": "gated"}], "eval_tokens": 2048}
    (wandb_folder / "run.yaml").write_text(to_yaml(small_run))
    module, name = {
        "train": ("sae_gated_plugin.training.run", "evaluate"),
        "sweep": ("sae_gated_plugin.sweeps.stream", "evaluate_all"),
    }[command]
    again = ["--resume", "out"] if command == "train" else ["run.yaml", "--output", "out"]
    first = Process(
        *(command, "run.yaml", "--output", "out"),
        log=wandb_folder / "first.log",
        before=lambda: setattr(sys.modules[module], name, _die),
    )
    assert first.wait() == -signal.SIGKILL, first.text()
    (killed,) = wandb_folder.glob("wandb/offline-run-*")
    second = Process(command, *again, log=wandb_folder / "second.log")
    assert second.wait() == 0, second.text()
    (measured,) = set(wandb_folder.glob("wandb/offline-run-*")) - {killed}
    assert [file.name for file in measured.glob("run-*.wandb")] == [
        file.name for file in killed.glob("run-*.wandb")
    ]
    (results,) = [json.loads(path.read_text()) for path in wandb_folder.rglob("results.json")]
    summary = read_summary(measured)
    for key in HELD_OUT:
        prefix = "gated-seed0/" if command == "sweep" else ""
        assert summary[f"{prefix}held_out/{key}"] == pytest.approx(results[key]), key


def test_a_summary_that_fails_is_a_warning(
    small_run: dict[str, Any],
    wandb_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.CommError("the server is gone")

    small_run["logger"] = WANDB
    monkeypatch.setattr("wandb.sdk.wandb_summary.Summary.update", fail)
    assert run(small_run, wandb_folder / "run")["l0"] > 0
    assert "CommError: the server is gone" in caplog.text
    assert wandb.run is None
    assert (wandb_folder / "run" / "results.json").exists()


def test_an_error_while_measuring_ends_the_run_as_failed(
    small_run: dict[str, Any], wandb_folder: Path
) -> None:
    text = wandb_folder / "text"
    shutil.copytree(small_run["dataset_path"], text)
    small_run.update(logger=WANDB, dataset_path=str(text))
    for file in [*text.glob("validation*"), *text.glob("test*")]:
        file.write_text("This is no text of a data set.")
    with pytest.raises(Exception, match=r"text|parquet|[Pp]arse"):
        run(small_run, wandb_folder / "run")
    assert (wandb_folder / "run" / "sae_weights.safetensors").exists()
    assert wandb.run is None
    (file,) = wandb_folder.rglob("run-*.wandb")
    (exit_code,) = [r.exit.exit_code for r in read_records(file) if r.HasField("exit")]
    assert exit_code == 1
