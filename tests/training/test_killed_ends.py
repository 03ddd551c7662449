"""Finishes of `sae-gated train` that are killed between the last step and the results."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens.training.sae_trainer import SAETrainer
from support.finishes import ALLOWED, KINDS, after_the_last_step, fail_wandb, fill_up
from support.process import Process
from support.runs import QUICKSTART, SMALL_RUN

from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.saes.load import load_sae

#: What a run has once its SAE is saved, and results.json when it is measured.
FINAL = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json")


def found(folder: Path) -> tuple[dict[str, Any], str]:
    """The results without what differs between two runs, and the weights' SHA-256."""
    results = json.loads((folder / "results.json").read_text())
    for name in ("seconds", "path"):
        del results[name]
    return results, hashlib.sha256((folder / FINAL[1]).read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_finishes_killed_at_random_moments_end_with_the_same_results(
    tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quickstart, from its last checkpoint on: ten steps, then the end."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    moments, expected, seconds = random.Random(), None, 0.0

    def start(name: str, *arguments: Any, then: Callable[[], None]) -> Process:
        return Process("train", *arguments, log=tmp_path / f"{name}.log", before=then)

    for logs in ("false", "true"):
        whole = tmp_path / f"whole-{logs}"
        options = ["n_checkpoints=49", f"logger.log_to_wandb={logs}", "--output", whole]
        marked = after_the_last_step(SAETrainer, (tmp_path / f"{logs}.marker").touch)
        process = start(logs, QUICKSTART / "quickstart.yaml", *options, then=marked)
        process.wait_for(tmp_path / f"{logs}.marker", 1800)
        began = time.monotonic()
        assert process.wait() == 0, process.text()
        seconds = max(seconds, time.monotonic() - began)
        assert expected is None or found(whole) == expected
        expected = found(whole)
        for name in (*FINAL, "results.json"):
            (whole / name).unlink()

    for trial in range(10):
        kind, name = KINDS[trial % len(KINDS)], f"trial{trial}"
        logs = kind == "failing logger"
        disk = mounted("size=96m") if kind == "full disk" else tmp_path / name
        run = shutil.copytree(tmp_path / f"whole-{str(logs).lower()}", disk / "run")
        # Half of them while the SAE is being saved, which takes some hundredths of a second.
        moment = moments.uniform(0, moments.choice((0.03, seconds)))
        marker = tmp_path / f"{name}.marker"
        then = after_the_last_step(SAETrainer, *([fail_wandb] if logs else []), marker.touch)
        killed = start(name, "--resume", run, then=then)
        killed.wait_for(marker)
        time.sleep(moment)
        if kind == "full disk":
            fill_up(disk)
        elif not logs:
            killed.kill(getattr(signal, kind))
        code = killed.wait()
        assert code in ALLOWED[kind], (kind, killed.text())
        assert "Traceback" not in killed.text(), killed.text()
        there = "SAE" if (run / FINAL[-1]).exists() else "checkpoint"
        load_sae(run if there == "SAE" else max((run / "checkpoints").glob("[0-9]*")))
        measured = (run / "results.json").exists()
        (disk / "filler").unlink(missing_ok=True)

        again = start(f"{name}-again", "--resume", run, then=lambda: None)
        assert again.wait() == 0, again.text()
        assert found(run) == expected, kind
        print(
            f"{name}: {kind} {moment:.3f} s after the last step (the end takes {seconds:.1f}): "
            f"exit code {code}, {there} there, {'' if measured else 'not '}measured; "
            f"--resume: same results, weights {expected[1][:12]}"
        )


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_a_disk_that_is_full_at_the_end_has_room_for_the_sae(
    checkpoints: int, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    """Room for it was set aside before the first step, and nothing of that is left."""
    disk = mounted("size=96m")
    (tmp_path / "run.yaml").write_text(to_yaml({**SMALL_RUN, "training_tokens": 5120}))
    options = [f"n_checkpoints={checkpoints}", "--output", disk / "run"]
    full = after_the_last_step(SAETrainer, lambda: fill_up(disk))
    process = Process("train", tmp_path / "run.yaml", *options, log=tmp_path / "log", before=full)
    assert process.wait() == 0, process.text()
    assert load_sae(disk / "run").cfg.d_sae == 256
    assert (disk / "run" / "results.json").exists()
    assert not list((disk / "run").glob(".*"))


def test_a_disk_without_room_for_the_sae_is_said_before_the_first_step(
    tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=256k")
    (tmp_path / "run.yaml").write_text(to_yaml(SMALL_RUN))
    options = ["--output", disk / "run"]
    never = after_the_last_step(SAETrainer, (tmp_path / "trained").touch)
    process = Process("train", tmp_path / "run.yaml", *options, log=tmp_path / "log", before=never)
    assert process.wait() == 2
    assert "no room for the SAE, 0.4 MB" in process.text(), process.text()
    assert "Make room, then go on with" in process.text()
    assert not (tmp_path / "trained").exists()
    assert [path.name for path in (disk / "run").iterdir()] == ["run.yaml"]
