"""Ranks killed at random moments, started again, end with the same bits; one that hangs too."""

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
from sae_gated_plugin.distributed import torchrun
from sae_gated_plugin.errors import ConfigError

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


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_hangs(stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other waits 20 s for it, says so, and torchrun ends both, after 30 s; nothing is lost."""
    monkeypatch.setenv(torchrun.PATIENCE_VARIABLE, "20")
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    # It must not end by itself: it is stopped after the first of 40 checkpoints.
    file.write_text(to_yaml({**SMALL_RUN, "training_tokens": 400 * 512, "n_checkpoints": 40}))
    run = Torchrun(2, file, "--output", folder, log=tmp_path / "log")
    while not list(folder.glob("checkpoints/*/trainer_state.pt")):
        assert run.process.poll() is None, run.text()
        time.sleep(0.05)
    os.kill(run.ranks()[stopped], signal.SIGSTOP)
    assert run.wait() == 1
    sentence = "Error: Another of the 2 processes has not answered for 20 s, so this one stopped"
    assert run.text().count(sentence) == 1, run.text()
    assert f"train --resume {folder}" in run.text()
    assert "exitcode  : 2" in run.text()
    for process in forked(2, "train", "--resume", folder, folder=tmp_path / "logs"):
        assert process.wait() == 0, process.text()
    assert (folder / "results.json").exists()


@pytest.mark.parametrize("seconds", ["0", "-5", "1.5", "long"])
def test_no_number_of_seconds(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(torchrun.PATIENCE_VARIABLE, seconds)
    with pytest.raises(ConfigError, match=f"SAE_GATED_RANK_TIMEOUT is '{seconds}'; it is the num"):
        torchrun.patience()
