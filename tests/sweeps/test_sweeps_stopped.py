"""A sweep that is stopped, killed, or run by two processes at once."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import wandb
from support.process import Process
from support.resuming import at_step
from support.sweeps import count_calls, names, places_of
from torch.optim.optimizer import register_optimizer_step_post_hook

from sae_gated_plugin.architectures.gated import GatedSAE
from sae_gated_plugin.config.yaml import read_yaml, to_yaml
from sae_gated_plugin.errors import ConfigError, Interrupted
from sae_gated_plugin.files import _lock
from sae_gated_plugin.sweeps.folder import PointFolder
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.stream import GO_ON, Stream, _Runner, streams_of
from sae_gated_plugin.sweeps.sweep import run_sweep


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("training", signal.SIGKILL, -9),
        ("training", signal.SIGTERM, 143),
        ("measuring", signal.SIGINT, 130),
        pytest.param("measuring", signal.SIGKILL, -9, marks=pytest.mark.slow),
        pytest.param("measuring", signal.SIGTERM, -15, marks=pytest.mark.slow),
    ],
)
def test_stopped_it_continues_and_ends_with_the_same_points(
    small_sweep: dict[str, Any], tmp_path: Path, moment: str, number: int, code: int
) -> None:
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(to_yaml(small_sweep))
    sent: list[int] = []

    def look(*_: Any) -> None:
        """After each step, or before an SAE is measured on a batch: whether it is time."""
        if not sent and (moment == "measuring" or any(output.glob("streams/*/*/runner_cfg.json"))):
            sent.append(number)
            os.kill(os.getpid(), number)

    def before() -> None:
        # Where the tests run in a shell's background SIGINT is ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if moment == "training":
            register_optimizer_step_post_hook(look)
        else:
            GatedSAE.encode, encode = lambda *given: (look(), encode(*given))[1], GatedSAE.encode

    process = Process("sweep", path, "--output", output, log=tmp_path / "log", before=before)
    assert process.wait() == code, process.text()
    said = process.text()
    assert "Traceback" not in said
    assert (GO_ON in said) == (code > 0)
    trained = sorted(output.glob("points/*/sae_weights.safetensors"))
    stamps = {file: file.stat().st_mtime_ns for file in trained}
    assert len(trained) == 4 * (moment == "measuring")

    sweep = load_sweep(path)
    results = run_sweep(sweep, output)
    assert [r["label"] for r in results] == ["ours", "ours", "topk", "topk"]
    assert all(r["loss_recovered"] > 0.3 for r in results)
    assert {file: file.stat().st_mtime_ns for file in trained} == stamps
    left = sorted(p.name for p in (output / "points").iterdir() if p.name[0] != ".")
    assert left == sorted(names(sweep))
    assert run_sweep(sweep, output) == results


def test_interrupted_in_training_it_ends_with_the_same_bits(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill the stream goes on from its newest complete checkpoint."""
    small_sweep["sweep"].update(seeds=[0])
    small_sweep["sweep"]["curves"][1] = {"architecture": "jumprelu", "l0_coefficient": 1.0}
    sweep, save = load_sweep(small_sweep), _Runner.save_checkpoint
    run_sweep(sweep, tmp_path / "whole")
    saved: list[Path] = []

    def die(self: Any, checkpoint_path: Path) -> None:
        save(self, checkpoint_path)
        saved.append(checkpoint_path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Runner, "save_checkpoint", die)
    with pytest.raises(Interrupted, match="the same command goes on"):
        run_sweep(sweep, tmp_path / "stopped")
    assert list((tmp_path / "stopped" / "streams").glob("*/*")) == saved[1:]
    run_sweep(sweep, tmp_path / "stopped")
    assert [int(path.name) for path in saved] == [8704, 16_896, 25_088, 33_280]
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_killed_while_it_saves_it_ends_with_the_same_bits(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second SAE is in the last checkpoint only, from which it goes on alone."""
    small_sweep["sweep"].update(seeds=[0])
    small_sweep["training_tokens"] = 10_240
    sweep, write = load_sweep(small_sweep), PointFolder.write
    run_sweep(sweep, tmp_path / "whole")

    def die(self: PointFolder, fill: Any) -> None:
        write(self, fill)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PointFolder, "write", die)
        with pytest.raises(Interrupted):
            run_sweep(sweep, tmp_path / "stopped")
    assert list(weights(tmp_path / "stopped")) == ["ours-seed0"]
    run_sweep(sweep, tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def weights(output: Path) -> dict[str, bytes]:
    """The weights of a sweep's SAEs by the names of their points."""
    files = output.glob("points/*/sae_weights.safetensors")
    return {file.parent.name: file.read_bytes() for file in files}


def test_two_processes_at_different_curves_leave_each_other_alone(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second trains and measures all of its own while the first is in the middle.

    The same curves again, meanwhile, are refused.
    """
    small_sweep["sweep"]["seeds"] = [0]
    sweep, original = load_sweep(small_sweep), _Runner.save_checkpoint
    other: list[dict[str, Any]] = []

    def meanwhile(self: Any, checkpoint_path: Path) -> None:
        original(self, checkpoint_path)
        if not other:
            monkeypatch.undo()
            with pytest.raises(ConfigError, match="being trained by another process"):
                run_sweep(sweep, tmp_path)
            other.extend(run_sweep(sweep, tmp_path, only=["topk"]))
            assert (checkpoint_path / "runner_cfg.json").exists()

    monkeypatch.setattr(_Runner, "save_checkpoint", meanwhile)
    results = run_sweep(sweep, tmp_path)  # both curves: topk is finished before it gets there
    assert [result["label"] for result in results] == ["ours", "topk"]
    assert results[1] == other[0]


def test_what_another_process_finished_before_the_lock_is_not_done_again(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this one takes the lock, the other one has done all of it."""
    small_sweep["sweep"].update(seeds=[0], curves=small_sweep["sweep"]["curves"][1:])
    small_sweep["training_tokens"] = 2048
    sweep, to_itself = load_sweep(small_sweep), Stream.to_itself
    other: list[dict[str, Any]] = []

    def late(self: Stream) -> Any:
        if not other:
            other.append({})  # it is that process now
            other[:] = run_sweep(sweep, tmp_path)
        return to_itself(self)

    monkeypatch.setattr(Stream, "to_itself", late)
    trained = count_calls(monkeypatch, Stream, "_train")
    measured = count_calls(monkeypatch, Stream, "_measure")
    assert run_sweep(sweep, tmp_path) == other
    assert (len(trained), len(measured)) == (1, 1)


def test_of_many_processes_that_wait_for_a_lock_one_has_it(
    small_sweep: dict[str, Any], tmp_path: Path
) -> None:
    """One that opened the lock's file before it was released must not hold another one's."""
    (stream,) = streams_of(places_of(small_sweep, tmp_path), tmp_path, None)
    with stream.to_itself():
        (file,) = (tmp_path / "streams").iterdir()
        opened = file.open("r+b")
    with opened:
        assert _lock(opened)
        with (
            pytest.raises(ConfigError, match="is being trained by another process"),
            stream.to_itself(),
        ):
            pass


def test_measuring_keeps_others_out_too(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sweep["sweep"].update(seeds=[0], curves=small_sweep["sweep"]["curves"][1:])
    small_sweep["training_tokens"] = 2048
    sweep, measure = load_sweep(small_sweep), Stream._measure

    def meanwhile(*arguments: Any) -> None:
        for engine in ("local", "ray"):
            with pytest.raises(ConfigError, match="being trained by another process"):
                run_sweep(sweep, tmp_path, engine=engine)
        measure(*arguments)

    monkeypatch.setattr(Stream, "_measure", meanwhile)
    assert "l0" in run_sweep(sweep, tmp_path)[0]


def test_a_finished_point_is_the_same_however_its_yaml_is_written(
    small_sweep: dict[str, Any], tmp_path: Path
) -> None:
    place = places_of(small_sweep, tmp_path)[0]
    place.write_failure("it may be any outcome")
    file = place.path / "run.yaml"
    text = file.read_text()
    mapping = dict(reversed(read_yaml(file).items()))
    for same in (
        "# a comment\n" + text,
        to_yaml(mapping),
        text.replace("lr: 0.002", "lr: 2.0e-3"),
        text + "adam_beta2: 0.999\n",  # the default
    ):
        assert same != text
        file.write_text(same)
        place.require_same()
    file.write_text(text.replace("lr: 0.002", "lr: 0.001"))
    with pytest.raises(ConfigError, match="another configuration"):
        place.require_same()


def test_saes_of_one_stream_keep_their_own_schedules(
    small_sweep: dict[str, Any], tmp_path: Path
) -> None:
    """Each learns as in a sweep of its learning rate alone, to the bit, also when stopped."""
    small_sweep["training_tokens"] = 10_240  # 20 steps
    curve = {"architecture": "gated", "l1_coefficient": 0.3, "target_l0": 16}
    own = {"lr": [1e-3, 4e-3], "lr_decay_steps": 8, "adam_beta2": 0.99}
    small_sweep["sweep"].update(
        seeds=[0], curves=[{**curve, "label": "own", **own}, {**curve, "label": "shared"}]
    )
    sweep = load_sweep(small_sweep)
    (stream,) = streams_of(places_of(small_sweep, tmp_path), tmp_path, None)
    assert len(stream.places) == 3

    hook = at_step(3 * 11, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(Interrupted):
            run_sweep(sweep, tmp_path / "together")
    finally:
        hook.remove()
    assert all(result["l0"] > 0 for result in run_sweep(sweep, tmp_path / "together"))
    weights: set[bytes] = set()
    for number, point in enumerate(sweep.points):
        alone = copy.deepcopy(small_sweep)
        chosen = {**own, "lr": own["lr"][number]} if number < 2 else {}
        alone.update(chosen, sweep={**alone["sweep"], "curves": [curve]})
        run_sweep(load_sweep(alone), tmp_path / point.name)
        file = tmp_path / point.name / "points" / "gated-seed0" / "sae_weights.safetensors"
        weights.add(file.read_bytes())
        same = tmp_path / "together" / "points" / point.name / file.name
        assert same.read_bytes() == file.read_bytes(), point.name
    assert len(weights) == 3


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("log", wandb.CommError("the server is gone")),
        ("log_artifact", wandb.CommError("the server is gone")),
        ("finish", wandb.CommError("the server is gone")),
        ("finish", KeyboardInterrupt()),
    ],
)
def test_a_wandb_that_fails_costs_no_point(
    small_sweep: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    error: BaseException,
) -> None:
    small_sweep["sweep"].update(seeds=[0])
    small_sweep.update(training_tokens=10_240, logger={"wandb_log_frequency": 5})
    sweep = load_sweep(small_sweep)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise error

    trained = count_calls(monkeypatch, Stream, "_train")
    stopped: list[BaseException] = []
    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, method, fail)
        try:
            run_sweep(sweep, tmp_path / "out")
        except KeyboardInterrupt as caught:
            stopped.append(caught)
    wandb.finish()
    wandb.teardown()
    assert bool(stopped) == isinstance(error, KeyboardInterrupt)
    assert stopped or "CommError: the server is gone" in caplog.text
    assert len(list(tmp_path.glob("out/points/*/sae_weights.safetensors"))) == 2
    assert all(result["l0"] > 0 for result in run_sweep(sweep, tmp_path / "out"))
    assert len(trained) == 1
