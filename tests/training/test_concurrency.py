"""Many processes at once, and a clock that jumps."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import SMALL_RUN

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.run import train

WEIGHTS = "sae_weights.safetensors"
PROCESSES = 8

#: Waits for the others, then activates, loads and measures, all of them at the same moment.
WORK = """
import json, pathlib, sys, time
run, meeting, number = map(pathlib.Path, sys.argv[1:])
(meeting / number).touch()
while len(list(meeting.iterdir())) < {processes}:
    time.sleep(0.01)
import torch
torch.set_num_threads(1)
import sae_lens
from sae_lens.registry import get_sae_class
assert get_sae_class("gated")[0].__module__ == "sae_gated_plugin.architectures.gated"
sae = sae_lens.SAE.load_from_disk(str(run))
from sae_gated_plugin.evaluation import evaluate
results = evaluate(sae, tokens=1024)
del results["seconds"]
print(json.dumps(results))
"""


@pytest.mark.slow
def test_eight_processes_activate_load_and_measure_at_once(
    trained_run: Path, tmp_path: Path
) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    code = WORK.format(processes=PROCESSES)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(trained_run), str(meeting), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(PROCESSES)
    ]
    ended = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, ended
    found = [json.loads(output.splitlines()[-1]) for output, _ in ended]
    assert all(results == found[0] for results in found)
    assert found[0]["l0"] > 0


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = {**SMALL_RUN, "training_tokens": 15_360, "n_checkpoints": 3}
    train(load_config(mapping), tmp_path / "steady")

    rng, true = random.Random(0), time.time

    def jumping() -> float:
        return true() + rng.choice([-1, 1]) * rng.uniform(0, 20 * 365 * 86_400)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        patch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
        results: dict[str, Any] = train(load_config(mapping), tmp_path / "jumping")
    steady, jumped = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("steady", "jumping"))
    assert steady == jumped
    assert 0 < results["seconds"] < 300
    assert math.isfinite(results["loss_recovered"])


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_its_date(tmp_path: Path) -> None:
    mapping = {**SMALL_RUN, "training_tokens": 15_360, "n_checkpoints": 3}
    train(load_config(mapping), tmp_path / "run")
    older, newer = checkpoints.numbered(tmp_path / "run" / "checkpoints")
    for path in (newer, *newer.iterdir()):
        os.utime(path, (0, 0))  # 1970
    for path in (older, *older.iterdir()):
        os.utime(path, (4e9, 4e9))  # 2096
    assert checkpoints.numbered(tmp_path / "run" / "checkpoints") == [older, newer]
    assert int(older.name) < int(newer.name)
    checkpoints.verify(newer)
