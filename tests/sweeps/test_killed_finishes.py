"""Finishes of `sae-gated sweep` that are killed between the last step and the last result."""

from __future__ import annotations

import copy
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from support.finishes import ALLOWED, KINDS, after_the_last_step, fail_wandb, fill_up
from support.process import Process
from support.runs import SMALL_RUN

from sae_gated_plugin.config.yaml import to_yaml


def found(output: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """The results and weights of a sweep, without what differs between two of them."""
    points: dict[str, tuple[dict[str, Any], bytes]] = {}
    for folder in output.glob("points/[!.]*"):
        results = json.loads((folder / "results.json").read_text())
        for name in ("seconds", "path"):
            del results[name]
        points[folder.name] = results, (folder / "sae_weights.safetensors").read_bytes()
    return points


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_finishes_killed_at_random_moments_end_with_the_same_results(
    tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = copy.deepcopy(SMALL_RUN)
    mapping.update(training_tokens=10_240, sae={"d_in": 128, "d_sae": 256})
    curves = [{"architecture": "gated", "l1_coefficient": [0.3, 0.6]}, {"architecture": "relu"}]
    mapping["sweep"] = {"eval_tokens": 4096, "curves": curves}
    (tmp_path / "sweep.yaml").write_text(to_yaml(mapping))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    moments = random.Random(0)

    def start(name: str, output: Path, *overrides: str, then: Callable[[], None]) -> Process:
        marker = tmp_path / f"{name}.marker"
        before = after_the_last_step(MultiSAETrainer, then, marker.touch)
        arguments = [tmp_path / "sweep.yaml", *overrides, "--output", output]
        return Process("sweep", *arguments, log=tmp_path / f"{name}.log", before=before)

    whole = start("whole", tmp_path / "whole", then=lambda: None)
    whole.wait_for(tmp_path / "whole.marker")
    began = time.monotonic()
    assert whole.wait() == 0, whole.text()
    seconds = time.monotonic() - began
    expected = found(tmp_path / "whole")
    assert len(expected) == 3

    for trial in range(10):
        kind, name = KINDS[trial % len(KINDS)], f"trial{trial}"
        disk = mounted("size=64m") if kind == "full disk" else tmp_path / name
        logs = kind == "failing logger"
        overrides = ["logger.log_to_wandb=true"] if logs else []
        then = fail_wandb if logs else lambda: None
        killed = start(name, disk / "out", *overrides, then=then)
        killed.wait_for(tmp_path / f"{name}.marker")
        # Half of them while the SAEs are being saved, which takes some hundredths of a second.
        time.sleep(moments.uniform(0, moments.choice((0.03, seconds))))
        if kind == "full disk":
            filler = fill_up(disk)
            killed.wait()
            filler.unlink()
        elif not logs:
            killed.kill(getattr(signal, kind))
        assert killed.wait() in ALLOWED[kind], (kind, killed.text())
        assert "Traceback" not in killed.text(), killed.text()

        again = start(f"{name}-again", disk / "out", *overrides, then=lambda: None)
        assert again.wait() == 0, again.text()
        assert found(disk / "out") == expected, kind


def test_a_disk_that_is_full_at_the_end_has_room_for_the_saes(
    tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=64m")
    mapping = {**copy.deepcopy(SMALL_RUN), "training_tokens": 5120}
    mapping["sweep"] = {"eval_tokens": 512, "curves": [{"l1_coefficient": [0.3, 0.6]}]}
    (tmp_path / "sweep.yaml").write_text(to_yaml(mapping))
    full = after_the_last_step(MultiSAETrainer, lambda: fill_up(disk))
    arguments = [tmp_path / "sweep.yaml", "--output", disk / "out"]
    process = Process("sweep", *arguments, log=tmp_path / "log", before=full)
    assert process.wait() == 0, process.text()
    assert len(found(disk / "out")) == 2
    assert not list((disk / "out").glob("streams/.*"))
