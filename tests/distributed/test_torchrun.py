"""A run that torchrun starts on several ranks leaves one process's files, whatever ends it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from support import resuming
from support.process import Process
from support.ranks import Torchrun, forked, on_ranks
from support.wandb_file import read_history

from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.distributed import torchrun
from sae_gated_plugin.distributed.ranks import Ranks
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.training import checkpoints

# 131 latents, of which four ranks have 32, 33, 33 and 33, and three texts at a time.
TINY: dict[str, Any] = {
    **resuming.TINY,
    "sae": {**resuming.TINY["sae"], "d_sae": 131},
    "store_batch_size_prompts": 3,
    "n_checkpoints": 10,
}
#: Of the weights, after 60 steps in float32 whose sums have another order.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(to_yaml(TINY))
    return path


@pytest.fixture(scope="module")
def one(tiny_yaml: Path) -> Path:
    """The folder of the run in one process."""
    folder = tiny_yaml.parent / "one"
    process = Process("train", tiny_yaml, "--output", folder, log=tiny_yaml.parent / "log")
    assert process.wait() == 0, process.text()
    return folder


@pytest.fixture(scope="module")
def stopped(tiny_yaml: Path) -> Path:
    """A run on two ranks that torchrun was told to end; copy it before going on with it."""
    folder = tiny_yaml.parent / "stopped"
    log, stopped = tiny_yaml.parent / "stopped.log", ("0", "20", "SIGTERM")
    run = Torchrun(2, tiny_yaml, "--output", folder, log=log, stopped=stopped)
    run.wait()
    assert run.text().count("All is saved in") == 1, run.text()
    assert "torchrun --nproc-per-node 2 -m sae_gated_plugin train --resume" in run.text()
    assert not (folder / "results.json").exists()
    return folder


def all_ended(processes: list[Process]) -> None:
    codes = [process.wait() for process in processes]
    assert codes == [0] * len(processes), "\n".join(process.text() for process in processes)


def require_equal(folder: Path, one: Path) -> None:
    """The files of two runs, up to the rounding of sums."""
    assert {file.name for file in folder.iterdir()} == {file.name for file in one.iterdir()}
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        here, there = load_file(folder / name), load_file(one / name)
        assert here.keys() == there.keys()
        for key, value in there.items():
            error = (here[key] - value).abs().max()
            assert error <= TOLERANCE * max(1.0, float(value.abs().max())), (key, float(error))
    configs = [json.loads((path / "cfg.json").read_text()) for path in (folder, one)]
    reached = [config["metadata"].pop("l1_coefficient_reached") for config in configs]
    assert reached[0] == pytest.approx(reached[1])
    assert configs[0] == configs[1]
    assert SAE.load_from_disk(folder).cfg.d_sae == 131


def test_torchrun_on_two_ranks(tiny_yaml: Path, one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Torchrun(2, tiny_yaml, "--output", folder, "--json", log=tmp_path / "log")
    assert run.wait() == 0, run.text()
    require_equal(folder, one)
    text = run.text()
    assert json.loads(text[text.index("{\n") :])["d_sae"] == 131  # one rank's answer
    for path in checkpoints.numbered(folder / "checkpoints"):
        checkpoints.verify(path)
        there = one / "checkpoints" / path.name
        files = {file.name for file in path.iterdir()}
        assert files == {file.name for file in there.iterdir()}
        states = [torch.load(p / "trainer_state.pt", weights_only=True) for p in (path, there)]
        moments = [state["optimizer"]["state"] for state in states]
        for index, tensors in moments[1].items():
            for key, value in tensors.items():
                torch.testing.assert_close(moments[0][index][key], value, rtol=1e-3, atol=1e-3)
        for name in ("act_freq_scores", "n_forward_passes_since_fired"):
            assert torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize("size", [4, 1])
def test_resumed_on_another_number_of_ranks(
    size: int, stopped: Path, one: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    all_ended(forked(size, "train", "--resume", folder, folder=tmp_path / "logs"))
    require_equal(folder, one)


def test_a_killed_rank_ends_the_others(tiny_yaml: Path, one: Path, tmp_path: Path) -> None:
    folder, stopped = tmp_path / "run", ("1", "40", "SIGKILL")
    run = Torchrun(2, tiny_yaml, "--output", folder, log=tmp_path / "log", stopped=stopped)
    assert run.wait() == 1
    newest = max(path.stat().st_mtime for path in (folder / "checkpoints").iterdir())
    assert time.time() - newest < 15
    sentence = "Error: Another of the 2 processes has ended, or cannot be reached"
    assert run.text().count(sentence) == 1, run.text()
    assert f"train --resume {folder}" in run.text()
    all_ended(forked(2, "train", "--resume", folder, folder=tmp_path / "logs"))
    require_equal(folder, one)


@pytest.mark.slow
@pytest.mark.parametrize("hanging", ["0", "1"])
def test_a_rank_that_hangs(
    hanging: str, tiny_yaml: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other waits 30 s for it and says so; torchrun kills it after 30 more."""
    monkeypatch.setenv(torchrun.PATIENCE_VARIABLE, "30")
    folder, stopped = tmp_path / "run", (hanging, "40", "SIGSTOP")
    run = Torchrun(2, tiny_yaml, "--output", folder, log=tmp_path / "log", stopped=stopped)
    assert run.wait() == 1
    sentence = "Error: Another of the 2 processes has not answered for 30 s, so this one stopped"
    assert run.text().count(sentence) == 1, run.text()
    assert f"train --resume {folder}" in run.text()
    assert "exitcode  : 2" in run.text()
    all_ended(forked(2, "train", "--resume", folder, folder=tmp_path / "logs"))
    require_equal(folder, one)


@pytest.mark.parametrize("seconds", ["0", "-5", "1.5", "long"])
def test_no_number_of_seconds(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(torchrun.PATIENCE_VARIABLE, seconds)
    with pytest.raises(ConfigError, match=f"SAE_GATED_RANK_TIMEOUT is '{seconds}'; it is the num"):
        torchrun.patience()


def test_ranks_that_were_not_started_alike(tiny_yaml: Path, tmp_path: Path) -> None:
    """Each process with another learning rate: one sentence, and nothing was written."""
    folder = tmp_path / "run"

    def other(rank: int) -> list[str]:
        return [f"lr=0.1{rank}"]

    run = forked(2, "train", tiny_yaml, "--output", folder, folder=tmp_path / "logs", own=other)
    assert [process.wait() for process in run] == [2, 2], run[0].text()
    for process in run:  # without torchrun's agent each says it
        said = process.text()
        assert said.count("started alike: lr is '0.1' on rank 0 and '0.11' on rank 1") == 1, said
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prefetch_llm_batches": True}, "prefetch_llm_batches is not supported with 2 processes"),
        ({"sae": {"architecture": "sae_lens_gated"}}, "'sae_lens_gated' cannot be divided"),
        ({"sae": {"architecture": "relu", "decoder_coherence": 0.5}}, "decoder_coherence compares"),
    ],
)
def test_what_several_processes_cannot_do(
    changed: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    changed = {**TINY, **changed}
    changed["sae"] = {"d_in": 128, "d_sae": 131, "architecture": "gated", **changed["sae"]}
    file, folder = tmp_path / "changed.yaml", tmp_path / "run"
    file.write_text(to_yaml(changed))
    run = forked(2, "train", file, "--output", folder, folder=tmp_path / "logs")
    assert [process.wait() for process in run] == [2, 2], run[0].text()
    assert sentence in run[0].text()
    assert not folder.exists()


def test_numbers_that_are_not_finite_stop_all_ranks(
    poisoned: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "poisoned.yaml"
    file.write_text(to_yaml(poisoned))
    folder = tmp_path / "run"
    run = forked(2, "train", file, "--output", folder, folder=tmp_path / "logs")
    assert [process.wait() for process in run] == [2, 2], run[0].text()
    assert "Training stopped before step" in run[0].text()
    (last,) = checkpoints.numbered(folder / "checkpoints")
    state = load_file(last / "sae_weights.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    assert state["W_dec"].shape == (256, 128)


def test_one_wandb_run_with_one_process_s_numbers(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[list[dict[str, Any]]] = []
    for size in (1, 2):
        place = tmp_path / str(size)
        place.mkdir()
        monkeypatch.chdir(place)
        monkeypatch.setenv("WANDB_DIR", str(place))
        overrides = ["logger.log_to_wandb=true", "logger.wandb_log_frequency=10"]
        overrides += ["logger.eval_every_n_wandb_logs=2", "training_tokens=2560"]
        arguments = ("train", tiny_yaml, *overrides, "--output", place / "run")
        all_ended(forked(size, *arguments, folder=place / "logs"))
        assert len(list(place.rglob("run-*.wandb"))) == 1
        logged.append(read_history(place))
    assert len(logged[0]) == len(logged[1]) > 2
    for one, two in zip(*logged):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if isinstance(value, int | float) and not name.startswith("_"):
                assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (one["_step"], name)


def test_other_versions_are_refused_by_all(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        with pytest.raises(ConfigError) as refused:
            Ranks(rank, 2).require_alike({"lr": 1, "versions": {"torch": f"2.{rank}"}})
        return str(refused.value)

    here, there = on_ranks(2, work, tmp_path)
    assert here == there
    assert "versions.torch is '2.0' on rank 0 and '2.1' on rank 1. Nothing was changed" in here


def test_a_full_disk_on_rank_0(
    tiny_yaml: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    folder = mounted("size=1200k") / "run"
    run = forked(2, "train", tiny_yaml, "--output", folder, folder=tmp_path / "logs")
    assert [process.wait() for process in run] == [2, 2], run[0].text()
    assert "No space left on device" in run[0].text()
    again = f"torchrun --nproc-per-node 2 -m sae_gated_plugin train --resume {folder}"
    assert f"Make room, then go on with: {again}" in run[0].text()
    assert not list(folder.rglob(".partial-*"))
