"""What `--resume` says and finds: damage, signals, two at once, full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from support.process import Process
from support.resuming import TINY, WEIGHTS, at_step, few_texts, interrupted

from sae_gated_plugin import files
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.errors import ArtifactError, ConfigError, Interrupted
from sae_gated_plugin.files import locked
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.activation_stream import ActivationStream
from sae_gated_plugin.training.run import resume, train
from sae_gated_plugin.training.run_folder import compare_beginnings
from sae_gated_plugin.training.runner import Runner


def test_only_the_last_two_are_kept(stopped: Path, tmp_path: Path) -> None:
    assert [p.name for p in checkpoints.numbered(stopped / "checkpoints")] == ["3712", "3840"]
    for name in ("1", "2", "10", "final_9", "damaged-3", ".partial-4"):
        (tmp_path / name).mkdir()
    checkpoints.prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "10", "final_9", "damaged-3"}
    checkpoints.prune(tmp_path, 0)
    assert len(checkpoints.numbered(tmp_path)) == 2


def test_a_finished_run(trained_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (trained_run / "results.json").read_bytes()
    assert resume(trained_run) == json.loads(before)
    assert f"Run '{trained_run}' is finished; nothing was done." in caplog.text
    assert (trained_run / "results.json").read_bytes() == before


def test_a_trained_run_is_measured(
    trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(trained_run, tmp_path / "run"))
    (folder / "results.json").unlink()
    results = resume(folder)
    assert "is trained already; it is measured" in caplog.text
    assert results["gamma"] == json.loads((trained_run / "results.json").read_text())["gamma"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"is not the folder of a run: it holds no run\.yaml"):
            resume(folder)


def test_a_changed_configuration(on_copy: Path) -> None:
    mapping = yaml.safe_load((on_copy / "run.yaml").read_text())
    mapping["lr"] = 1.0
    (on_copy / "run.yaml").write_text(to_yaml(mapping))
    with pytest.raises(ConfigError, match=r"run\.yaml' was changed \(lr\) since .* new folder"):
        resume(on_copy)


def test_another_machine_is_said(on_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, manifest = checkpoints.newest(on_copy / "checkpoints") or pytest.fail("none")
    manifest["machine"].update(threads=8, torch="1.0")
    compare_beginnings(on_copy, load_config(on_copy / "run.yaml"), manifest)
    assert f"torch: 1.0, now {torch.__version__}" in caplog.text
    assert "threads: 8, now 1" in caplog.text
    assert "may differ in their last bits" in caplog.text


def test_other_texts_are_refused(on_copy: Path, tmp_path: Path) -> None:
    """A data set that was replaced under the same name."""
    mapping = yaml.safe_load((on_copy / "run.yaml").read_text())
    config = load_config(mapping, few_texts(mapping, tmp_path / "data")).with_output(on_copy)
    config.runner.resume_from_checkpoint = str(checkpoints.numbered(on_copy / "checkpoints")[-1])
    start = checkpoints.newest(on_copy / "checkpoints")
    with pytest.raises(ConfigError, match="texts are not those that the run has read"):
        Runner(config, start).run()


# --- damage ---------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_every_damage_is_found(
    on_copy: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = checkpoints.numbered(on_copy / "checkpoints")
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) == 9
    for name in names:
        caplog.clear()
        good = Path(shutil.copytree(newest, on_copy / "good"))
        damage(newest / name)
        path, _ = checkpoints.newest(on_copy / "checkpoints") or pytest.fail("none")
        assert path == before
        what = "missing" if damage is Path.unlink or name == "manifest.json" else "not as written"
        assert f"{name} is {what}" in caplog.text
        assert f"set aside as '{on_copy / 'checkpoints' / 'damaged-3840'}'" in caplog.text
        good.rename(newest)


def test_a_damaged_newest_and_no_sound_one(
    on_copy: Path, whole: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    again = Path(shutil.copytree(on_copy, on_copy.with_name("again")))
    flip(on_copy / "checkpoints" / "3840" / WEIGHTS)
    resume(on_copy)
    assert (on_copy / WEIGHTS).read_bytes() == whole
    for path in checkpoints.numbered(again / "checkpoints"):
        truncate(path / "exact_state.safetensors")
    resume(again)
    assert "has no checkpoint; it starts from the beginning" in caplog.text
    assert (again / WEIGHTS).read_bytes() == whole


def test_no_checkpoint_runs_code(on_copy: Path) -> None:
    """Also not one whose manifest somebody has made to fit."""
    path = checkpoints.numbered(on_copy / "checkpoints")[-1]

    class Code:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {on_copy}/ran",)

    torch.save({"optimizer": Code()}, path / "trainer_state.pt")
    with pytest.raises(ArtifactError, match="cannot be read as tensors"):
        checkpoints.require_tensors_only(path)
    assert not (on_copy / "ran").exists()


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_more_signals_while_saving(
    tiny_yaml: Path, tmp_path: Path, whole: bytes, number: int, code: int
) -> None:
    """The first stops the training; those that come while it is saved change nothing."""

    def before() -> None:
        sync = files.sync

        def interrupted_sync(path: Path) -> None:
            if path.parent.name == ".partial-2560":
                for again in (number, signal.SIGTERM, signal.SIGINT):
                    signal.raise_signal(again)
            sync(path)

        files.sync = interrupted_sync
        at_step(20, lambda: signal.raise_signal(number))

    folder, log = tmp_path / "a run", tmp_path / "log"
    process = Process("train", tiny_yaml, "--output", folder, log=log, before=before)
    assert process.wait() == code, process.text()
    (sentence,) = [line for line in process.text().splitlines() if line.startswith("Interrupted")]
    newest = folder / "checkpoints" / "2560"
    assert sentence == (
        f"Interrupted. All is saved in '{newest}'; go on with: sae-gated train --resume '{folder}'"
    )
    assert checkpoints.verify(newest)["steps"] == 20
    assert not list(folder.glob("checkpoints/.*"))
    resume(folder)
    assert (folder / WEIGHTS).read_bytes() == whole


def test_a_signal_before_the_first_step(tiny_yaml: Path, tmp_path: Path) -> None:
    config = load_config(TINY)
    hook = at_step(10**6, lambda: None)
    folder = tmp_path / "run"
    original = ActivationStream.__next__

    def stopping(self: ActivationStream) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        return original(self)

    try:
        ActivationStream.__next__ = stopping
        with pytest.raises(Interrupted, match=r"Nothing was trained yet; go on with: sae-gated"):
            train(config, folder)
    finally:
        ActivationStream.__next__ = original
        hook.remove()
    assert not list(folder.glob("checkpoints/*"))


# --- two at once, full disks, folders that cannot be written --------------------------------------


def test_two_trainings_in_one_folder(tiny_yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = Process(
        "train", tiny_yaml, "training_tokens=1000000", "--output", folder, log=tmp_path / "log"
    )
    process.wait_for(folder / "checkpoints")
    with pytest.raises(
        ConfigError, match=r"already holds a run \(run\.yaml.*or go on with --resume"
    ):
        train(load_config(tiny_yaml), folder)
    with pytest.raises(ConfigError, match="is being trained by another process; nothing was"):
        resume(folder)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with locked(folder / "run.yaml"):  # the lock has died with its process
        pass


def test_a_full_disk(
    tiny_yaml: Path, tmp_path: Path, whole: bytes, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=1100k")
    folder, log = disk / "run", tmp_path / "log"
    process = Process("train", tiny_yaml, "--output", folder, log=log)
    assert process.wait() == 2, process.text()
    (sentence,) = [line for line in process.text().splitlines() if line.startswith("Error")]
    assert "Checkpoint" in sentence
    assert "cannot be written: " in sentence
    assert f"Make room, then go on with: sae-gated train --resume {folder}" in sentence
    kept = checkpoints.numbered(folder / "checkpoints")
    assert kept
    for path in kept:
        checkpoints.verify(path)
    assert not list(folder.glob("checkpoints/.*"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    resume(folder)
    assert (folder / WEIGHTS).read_bytes() == whole


@pytest.mark.slow
def test_a_home_that_cannot_be_written(
    tiny_yaml: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    home = mounted("ro,size=1m")
    command = ["sae-gated", "train", str(tiny_yaml), "--output"]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HOME"} | {"HOME": str(home)}

    def last_line(folder: Path, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, str(folder)], env={**environment, **more}, capture_output=True, text=True
        )
        return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).splitlines()[
            -1
        ]

    code, line = last_line(tmp_path / "run")
    assert code == 2
    assert "Read-only file system" in line
    assert line.endswith("Set HF_HOME to a folder that can be written")
    assert not (tmp_path / "run").exists()
    assert last_line(tmp_path / "run", HF_HOME=str(tmp_path / "cache"))[0] == 0


def test_a_folder_that_cannot_be_written(mounted: Callable[[str], Path]) -> None:
    folder = mounted("ro,size=1m") / "run"
    with pytest.raises(ConfigError, match=r"cannot be written: .*Read-only file system"):
        train(load_config(TINY), folder)


# --- wandb ----------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_RESUME", raising=False)
    mapping = {**TINY, "logger": {"wandb_log_frequency": 5}}
    interrupted(mapping, tmp_path / "run")
    resume(tmp_path / "run")
    wandb.teardown()
    files = sorted(path.name for path in tmp_path.rglob("*.wandb"))
    assert len(files) == 2
    assert files[0] == files[1]
