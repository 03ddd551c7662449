"""Sweeps: the grid, one stream for many SAEs, interruption, failure, Ray."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from sae_lens import SAE, ActivationsStore, TopKTrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.config.yaml import read_yaml, to_yaml
from sae_gated_plugin.errors import ConfigError, Interrupted, SaeGatedError
from sae_gated_plugin.files import _lock
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.sweeps.folder import PointFolder
from sae_gated_plugin.sweeps.grid import Sweep, load_sweep
from sae_gated_plugin.sweeps.stream import GO_ON, Stream, _Runner, streams_of
from sae_gated_plugin.sweeps.sweep import run_sweep
from sae_gated_plugin.training.run import train


@pytest.fixture
def small_sweep(small_run: dict[str, Any]) -> dict[str, Any]:
    """Four points that train in a few seconds."""
    small_run["sae"] = {"d_in": 128, "d_sae": 256, "l1_warm_up_steps": 10}
    small_run["sweep"] = {
        "seeds": [0, 1],
        "eval_tokens": 2048,
        "curves": [
            {"label": "ours", "architecture": "gated", "l1_coefficient": 0.3},
            {"architecture": "topk", "k": [8]},
        ],
    }
    return small_run


def places_of(mapping: dict[str, Any], folder: Path) -> list[PointFolder]:
    return [PointFolder(p, folder / "points" / p.name) for p in load_sweep(mapping).points]


def names(sweep: Sweep) -> list[str]:
    return [point.name for point in sweep.points]


# --- the grid -------------------------------------------------------------------------------------


def test_lists_are_alternatives_and_all_combinations_are_points(
    small_sweep: dict[str, Any],
) -> None:
    small_sweep["sweep"]["curves"] = [
        {"label": "a", "architecture": "gated", "l1_coefficient": [1, 2], "lr": [1e-3, 2e-3]},
        {"architecture": "topk", "k": 8},
    ]
    sweep = load_sweep(small_sweep)
    assert len(sweep.points) == 10
    assert names(sweep)[0] == "a-l1_coefficient=1-lr=0.001-seed0"
    assert names(sweep)[-1] == "topk-seed1"
    first, last = sweep.points[0].config.runner, sweep.points[-1].config.runner
    assert (first.sae.l1_coefficient, first.lr, first.seed) == (1, 1e-3, 0)
    assert (last.sae.k, last.lr, last.seed) == (8, small_sweep["lr"], 1)
    assert first.sae.l1_warm_up_steps == 10  # shared; topk has no such field
    assert sweep.points[0].settings == {"l1_coefficient": 1, "lr": 1e-3}


def test_a_point_is_a_run_that_train_accepts(small_sweep: dict[str, Any]) -> None:
    point = load_sweep(small_sweep, ["lr=5e-4"]).points[0]
    assert load_config(point.config.mapping).runner.lr == 5e-4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"curves": []}, "The sweep is empty"),
        ({"seeds": []}, "The sweep is empty"),
        ({"curves": [{"k": 3}]}, r"'sweep.curves\[0\].architecture' is missing"),
        ({"curves": [{"architecture": "gatd"}]}, "Did you mean 'gated'"),
        ({"curves": [{"architecture": "topk", "kk": 3}]}, "Unknown key 'sae.kk'.*'sae.k'"),
        ({"curves": [{"architecture": "topk"}] * 2}, "are the same, .*: topk-seed0, topk-seed1"),
        ({"curves": {"architecture": "topk"}}, "must be a list of mappings"),
        ({"curve": []}, "Unknown key 'sweep.curve'.*'sweep.curves'"),
        ({"seeds": [0.5]}, "'sweep.seeds' in .* must be a list of whole numbers"),
        (
            {"curves": [{"architecture": "topk", "seeds": 3}]},
            r"'sweep.curves\[0\].seeds' in .* must be a list of whole numbers",
        ),
        ({"curves": [{"architecture": "topk", "seeds": [], "k": 3}]}, "The sweep is empty"),
        ({"curves": [{"architecture": "topk", "seed": [1, 2]}]}, "a list, 'seeds'"),
        ({"eval_tokens": 0}, "'sweep.eval_tokens' must be above 1, not 0"),
        ({"eval_tokens": "all"}, "'sweep.eval_tokens' in .* must be a whole number"),
        ({"curves": [{"architecture": "topk", "label": "x" * 300}]}, "too long for the name"),
    ],
)
def test_bad_sweeps_are_sentences(
    small_sweep: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    small_sweep["sweep"].update(change)
    with pytest.raises(SaeGatedError, match=sentence):
        load_sweep(small_sweep)


def test_the_sweep_itself_can_be_overridden(small_sweep: dict[str, Any]) -> None:
    overrides = ["sweep.seeds=[5]", "sweep.eval_tokens=99", "lr=5e-4"]
    sweep = load_sweep(small_sweep, overrides)
    assert {point.seed for point in sweep.points} == {5}
    assert sweep.eval_tokens == sweep.mapping["sweep"]["eval_tokens"] == 99
    assert sweep.mapping["sweep"]["seeds"] == [5]
    assert sweep.mapping["lr"] == 5e-4
    again = load_sweep(sweep.mapping)
    assert [point.config.mapping for point in again.points] == [
        point.config.mapping for point in sweep.points
    ]
    with pytest.raises(ConfigError, match=r"Unknown key 'sweep\.seed'.*'sweep\.seeds'"):
        load_sweep(small_sweep, ["sweep.seed=5"])


def test_a_curve_may_have_seeds_of_its_own(small_sweep: dict[str, Any]) -> None:
    curves = [{"architecture": "topk", "k": 3, "seeds": [2]}, {"architecture": "gated"}]
    small_sweep["sweep"]["curves"] = curves
    points = load_sweep(small_sweep).points
    assert [point.name for point in points] == ["topk-seed2", "gated-seed0", "gated-seed1"]
    assert [point.config.runner.seed for point in points] == [2, 0, 1]


@pytest.mark.parametrize(
    ("override", "own", "expected"),
    [
        ("sweep.seeds=[3]", {}, ["ours-seed3", "topk-seed3"]),
        ("sweep.seeds=[3]", {"seeds": [4]}, ["ours-seed4", "topk-seed3"]),
        ("sweep.curves=[{architecture: topk, k: 3}]", {}, ["topk-seed0", "topk-seed1"]),
        ("seed=3", {"seeds": [4, 5]}, ["ours-seed3", "topk-seed3"]),
        ("lr=1e-4", {"lr": [1e-2, 1e-3], "seeds": [0]}, ["ours-seed0", "topk-seed0", "topk-seed1"]),
        ("sae.d_sae=64", {"d_sae": [8, 9], "seeds": []}, ["topk-seed0", "topk-seed1"]),
        ("sae.architecture=relu", {"label": "x", "seeds": []}, ["relu-seed0", "relu-seed1"]),
    ],
)
def test_an_override_holds_for_every_point_and_is_in_sweep_yaml(
    small_sweep: dict[str, Any], override: str, own: dict[str, Any], expected: list[str]
) -> None:
    small_sweep["sweep"]["curves"] = [
        {"label": "ours", "architecture": "gated", **own},
        {"architecture": "topk"},
    ]
    before = copy.deepcopy(small_sweep)
    sweep = load_sweep(small_sweep, [override])
    assert small_sweep == before
    assert names(sweep) == expected
    for point in sweep.points:
        assert point.config.runner.seed == point.seed
        if not override.startswith("sweep."):
            key, value = override.split("=")
            said = {**point.config.mapping, **point.config.mapping["sae"]}
            assert f"{said[key.removeprefix('sae.')]}" in (value, "0.0001")
    again = load_sweep(sweep.mapping)
    assert [p.config.mapping for p in again.points] == [p.config.mapping for p in sweep.points]
    assert load_sweep(small_sweep, ["sweep.eval_tokens=99"]).eval_tokens == 99


def test_a_run_is_no_sweep(small_run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a 'sweep' section"):
        load_sweep(small_run)


def test_a_shared_field_that_nobody_has_is_found(small_sweep: dict[str, Any]) -> None:
    small_sweep["sae"]["l1_warmup_steps"] = 3
    with pytest.raises(ConfigError, match=r"Unknown key 'sae.l1_warmup_steps'"):
        load_sweep(small_sweep)


# --- running --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A finished sweep of four points and one that diverges, and what `run` returned."""
    from support.runs import SMALL_RUN

    mapping = copy.deepcopy(SMALL_RUN)
    mapping["sae"] = {"d_in": 128, "d_sae": 256, "l1_warm_up_steps": 10}
    mapping["sweep"] = {
        "seeds": [0, 1],
        "eval_tokens": 2048,
        "curves": [
            {"label": "ours", "architecture": "gated", "l1_coefficient": [0.3]},
            {"architecture": "topk", "k": [8]},
            {"label": "bad", "architecture": "standard", "l1_coefficient": 1e38},
        ],
    }
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep-file.yaml").write_text(to_yaml(mapping))
    return folder / "out", run_sweep(load_sweep(folder / "sweep-file.yaml"), folder / "out")


def test_every_point_has_a_run_folder_with_results(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, results = finished
    good = [r for r in results if "error" not in r]
    assert [(r["label"], r["seed"]) for r in good] == [
        ("ours", 0),
        ("ours", 1),
        ("topk", 0),
        ("topk", 1),
    ]
    for result in good:
        path = Path(result["path"])
        assert json.loads((path / "results.json").read_text()).items() <= result.items()
        assert {p.name for p in path.iterdir()} == {
            "cfg.json",
            "results.json",
            "run.yaml",
            "runner_cfg.json",
            "sae_weights.safetensors",
            "sparsity.safetensors",
        }
        assert SAE.load_from_disk(path).cfg.d_sae == 256
        assert result["tokens"] > 1900
        assert result["training_tokens"] == 40_960
    assert good[2]["l0"] == pytest.approx(8, abs=0.1)
    assert good[0]["l0"] != good[1]["l0"]  # the seed makes other weights
    assert {path.suffix for path in (folder / "streams").iterdir()} <= {".lock"}


def test_a_point_that_diverges_is_recorded_and_the_others_finish(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, results = finished
    bad = [r for r in results if "error" in r]
    assert [(r["label"], r["seed"]) for r in bad] == [("bad", 0), ("bad", 1)]
    assert "not finite" in bad[0]["error"]
    assert (folder / "points" / "bad-seed0" / "failed.json").exists()


def fail_in_step(monkeypatch: pytest.MonkeyPatch, sae_class: Any, *moments: int) -> list[int]:
    """As CUDA does: an exception in the middle of a class's steps; returns the steps it began."""
    forward, begun = sae_class.training_forward_pass, []

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        begun.append(step_input.n_training_steps)
        if begun[-1] in moments:
            raise RuntimeError("CUDA error: an illegal address\nfor more, see the manual")
        return forward(self, step_input)

    monkeypatch.setattr(sae_class, "training_forward_pass", training_forward_pass)
    return begun


def test_an_exception_in_a_step_is_one_points_failure(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one becomes what it would without the first."""
    small_sweep["training_tokens"] = 10_240
    small_sweep["sweep"].update(seeds=[0])
    small_sweep["sweep"]["curves"].reverse()  # the failing one leads SAELens's count of tokens
    sweep = load_sweep(small_sweep)
    run_sweep(sweep, tmp_path / "alone", only=["ours"])
    begun = fail_in_step(monkeypatch, TopKTrainingSAE, 7)
    failed, good = run_sweep(sweep, tmp_path / "both")
    assert failed["error"] == "RuntimeError: CUDA error: an illegal address"
    assert (failed["label"], failed["architecture"]) == ("topk", "topk")
    assert begun == list(range(8))
    alone, both = (
        load_file(tmp_path / name / "points" / "ours-seed0" / "sae_weights.safetensors")
        for name in ("alone", "both")
    )
    assert all(torch.equal(alone[key], both[key]) for key in alone)
    assert good["l0"] > 0


def test_where_every_point_fails_the_stream_ends(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sweep["sweep"].update(curves=small_sweep["sweep"]["curves"][1:])
    small_sweep["training_tokens"] = 10**9
    fail_in_step(monkeypatch, TopKTrainingSAE, 1)
    results = run_sweep(load_sweep(small_sweep), tmp_path)
    assert [result["error"] for result in results] == [
        "RuntimeError: CUDA error: an illegal address"
    ] * 2


def test_an_sae_that_cannot_be_made_is_one_points_failure(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sweep["sweep"].update(seeds=[0])
    small_sweep["training_tokens"] = 2048

    def refuse(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(TopKTrainingSAE, "initialize_weights", refuse)
    good, failed = run_sweep(load_sweep(small_sweep), tmp_path)
    assert (good["label"], failed["error"]) == ("ours", "MemoryError")
    assert good["l0"] > 0


def test_what_failed_before_a_kill_does_not_go_on_after_it(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has missed batches; the checkpoint says so."""
    small_sweep["sweep"].update(seeds=[0])
    sweep = load_sweep(small_sweep)
    begun = fail_in_step(monkeypatch, TopKTrainingSAE, 3)
    save = _Runner.save_checkpoint
    saved: list[Any] = []

    def die(self: Any, checkpoint_path: Path | None) -> None:
        save(self, checkpoint_path)
        saved.append(checkpoint_path)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Runner, "save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path)
    good, failed = run_sweep(sweep, tmp_path)
    assert begun == [0, 1, 2, 3]
    assert failed["error"] == "RuntimeError: CUDA error: an illegal address"
    assert good["l0"] > 0


def test_what_cannot_be_measured_is_one_points_failure_and_tried_again(
    small_sweep: dict[str, Any], tmp_path: Path
) -> None:
    small_sweep["training_tokens"] = 2048
    small_sweep["sweep"].update(seeds=[0])
    sweep = load_sweep(small_sweep)
    before = run_sweep(sweep, tmp_path)
    folders = [Path(result["path"]) for result in before]
    for folder in folders:
        (folder / "results.json").unlink()
    whole = (folders[0] / "sae_weights.safetensors").read_bytes()
    (folders[0] / "sae_weights.safetensors").write_bytes(whole[:-1000])
    failed, good = run_sweep(sweep, tmp_path)
    assert "It is trained, but cannot be measured: The weights" in failed["error"]
    assert "are damaged or cut short" in failed["error"]
    assert good["l0"] == before[1]["l0"]
    (folders[0] / "sae_weights.safetensors").write_bytes(whole)
    again = run_sweep(sweep, tmp_path)
    assert [result["l0"] for result in again] == [result["l0"] for result in before]
    assert not (folders[0] / "failed.json").exists()


def test_a_finished_sweep_is_not_trained_again(
    finished: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = finished
    monkeypatch.setattr(Stream, "run", lambda self: pytest.fail("trained again"))
    assert run_sweep(load_sweep(folder.parent / "sweep-file.yaml"), folder) == results


def test_another_sweep_in_the_same_folder_is_refused(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = finished
    other = load_sweep(folder.parent / "sweep-file.yaml", ["lr=1e-4"])
    with pytest.raises(ConfigError, match=r"another configuration.*nothing was changed"):
        run_sweep(other, folder)


def test_only_some_curves(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = finished
    sweep = load_sweep(folder.parent / "sweep-file.yaml")
    assert [r["label"] for r in run_sweep(sweep, folder, only=["topk"])] == ["topk", "topk"]
    with pytest.raises(ConfigError, match=r"Unknown label 'tpk'.*Did you mean 'topk'"):
        run_sweep(sweep, folder, only=["tpk"])


def test_a_shared_stream_trains_like_a_run_of_its_own(
    small_sweep: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights to start from, batches in another order: the same SAE within noise."""
    small_sweep["sweep"].update(seeds=[0], curves=small_sweep["sweep"]["curves"][:1])
    small_sweep["training_tokens"] = 102_400
    sweep = load_sweep(small_sweep)
    (shared,) = run_sweep(sweep, tmp_path / "sweep")
    alone = train(sweep.points[0].config, tmp_path / "run", eval_tokens=2048)
    assert shared["tokens"] == alone["tokens"]
    assert shared["l0"] == pytest.approx(alone["l0"], rel=0.1)
    assert shared["fvu"] == pytest.approx(alone["fvu"], rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_shared_stream_is_that_of_a_run_of_its_own(
    small_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Also of a language model in half precision: SAELens's single run trains on float32."""
    small_sweep.update(training_tokens=10_240, model_from_pretrained_kwargs={"torch_dtype": dtype})
    small_sweep["sweep"].update(seeds=[0], curves=small_sweep["sweep"]["curves"][:1])
    sweep, step = load_sweep(small_sweep), SAETrainer.step
    dtypes: set[torch.dtype] = set()

    def see(self: Any, batch: torch.Tensor) -> Any:
        dtypes.add(batch.dtype)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "step", see)
        run_sweep(sweep, tmp_path)
    assert dtypes == {torch.float32}
    (shared,) = tmp_path.glob("points/*/sae_weights.safetensors")

    cfg = sweep.points[0].config.runner
    model = HookPoint.load(
        cfg.model_name,
        cfg.model_class_name,
        cfg.hook_name,
        from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
    ).model
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    torch.manual_seed(0)
    sae = get_sae_training_class("gated")[0](copy.deepcopy(cfg.sae))
    torch.manual_seed(0)
    store = ActivationsStore.from_config(model, cfg)
    SAETrainer(cfg=cfg.to_sae_trainer_config(), sae=sae, data_provider=store).fit()
    sae.save_inference_model(str(tmp_path / "alone"))
    alone = load_file(tmp_path / "alone" / "sae_weights.safetensors")
    assert alone["W_enc"].dtype == torch.float32
    assert all(torch.equal(value, alone[name]) for name, value in load_file(shared).items())


def test_results_are_the_same_measured_together_or_alone(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    from sae_gated_plugin.measure.evaluate import evaluate

    _, results = finished
    alone = evaluate(results[1]["path"], tokens=2048)
    for name in ("l0", "fvu", "gamma", "loss_recovered", "kl", "dead_share"):
        assert alone[name] == pytest.approx(results[1][name], rel=1e-5), name


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
    small_sweep["training_tokens"] = 153_600
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(to_yaml(small_sweep))
    command = [sys.executable, "-m", "sae_gated_plugin", "sweep", str(path)]
    command += ["--output", str(output), "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in a shell's background SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    awaited = "streams/*/*/runner_cfg.json" if moment == "training" else "points/*/cfg.json"
    deadline = time.monotonic() + 120
    while not list(output.glob(awaited)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode == code
    assert "Traceback" not in said
    assert (GO_ON in said) == (code > 0)
    before = sorted(output.glob("points/*/sae_weights.safetensors"))
    stamps = {file: file.stat().st_mtime_ns for file in before}
    assert bool(before) == (moment == "measuring")

    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    results = json.loads(ended.stdout)
    assert [r["label"] for r in results] == ["ours", "ours", "topk", "topk"]
    assert all(r["loss_recovered"] > 0.3 for r in results)
    assert {file: file.stat().st_mtime_ns for file in before} == stamps
    assert sorted(p.name for p in (output / "points").iterdir() if p.name[0] != ".") == sorted(
        names(load_sweep(small_sweep))
    )
    again = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(again.stdout) == results


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


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original = getattr(owner, name)

    def call(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, name, call)
    return calls


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


def test_an_unknown_engine_is_a_sentence(small_sweep: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine is 'slurm'; allowed: local, ray"):
        run_sweep(load_sweep(small_sweep), tmp_path, engine="slurm")


def test_what_a_stream_cannot_do_is_refused(small_sweep: dict[str, Any], tmp_path: Path) -> None:
    small_sweep["compile_sae"] = True
    with pytest.raises(ConfigError, match="compile_sae cannot be used in a sweep"):
        run_sweep(load_sweep(small_sweep), tmp_path)


@pytest.mark.filterwarnings("ignore:decoder=.* mixes the two:UserWarning")
def test_the_recipes_are_valid() -> None:
    """Every sweep in configs/ loads; those that need downloads are not run."""
    configs = Path(__file__).parents[2] / "configs"
    found = [path for path in sorted(configs.glob("*.yaml")) if "\nsweep:\n" in path.read_text()]
    assert len(found) >= 5
    for path in found:
        assert load_sweep(path).points
