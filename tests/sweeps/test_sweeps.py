"""Sweeps: one stream for many SAEs, and what one point's failure costs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, ActivationsStore, TopKTrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.stream import Stream, _Runner
from sae_gated_plugin.sweeps.sweep import run_sweep
from sae_gated_plugin.training.run import train


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
