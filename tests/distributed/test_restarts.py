"""Ranks killed at random moments, which torchrun starts again, end with the same bits."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.ranks import Torchrun, forked
from support.runs import SMALL_RUN

from sae_gated_plugin.config.yaml import to_yaml

KILLS = int(os.environ.get("SAE_GATED_KILLS", "4"))


@pytest.mark.slow
@pytest.mark.timeout(240 + 120 * KILLS)
def test_killed_and_started_again(tmp_path: Path) -> None:
    """400 steps and 40 checkpoints; each kill comes when there is a checkpoint more, or two."""
    file, weights = tmp_path / "run.yaml", "sae_weights.safetensors"
    sae = {**SMALL_RUN["sae"], "target_l0": 8, "dead_latents": "resample"}
    sae |= {"resample_steps": [120, 250], "resample_warm_up_steps": 20}
    run = {**SMALL_RUN, "sae": sae, "training_tokens": 400 * 512, "n_checkpoints": 40}
    file.write_text(to_yaml(run))
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for process in forked(2, "train", file, "--output", whole, folder=tmp_path / "logs"):
        assert process.wait() == 0, process.text()
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    options = ("--max-restarts", str(KILLS))
    training = Torchrun(2, file, "--output", folder, log=tmp_path / "log", options=options)
    killed, seen = 0, 0
    while training.process.poll() is None and killed < KILLS:
        time.sleep(chance.random() / 10)
        numbers = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal()]
        ranks = training.ranks()
        if max(numbers, default=0) > seen and len(ranks) == 2:
            seen = max(numbers)
            time.sleep(chance.random() / 4)
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(ranks), signal.SIGKILL)
                killed += 1
    assert training.process.wait(timeout=120 * (1 + KILLS)) == 0, (seed, training.text())
    print(f"{killed} kills, seed {seed}")
    assert killed == KILLS
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes(), seed
    assert (folder / "results.json").exists()
