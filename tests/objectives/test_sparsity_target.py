"""`target_l0`: λ finds its value, its state is in the checkpoint and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.planted import make_trainer, planted_batches

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.objectives import sparsity_target
from sae_gated_plugin.training.run import train


def simulate(steps: int, l0_start: float, delay: float, target: float) -> tuple[float, float]:
    """A plant whose log L0 follows -0.8 log λ with a delay; returns its last L0 and log λ."""
    state = sparsity_target.new_state("cpu")
    log_l0 = torch.tensor(l0_start).log()
    rest = torch.tensor(200.0).log()
    for _ in range(steps):
        sparsity_target.advance(state, log_l0.exp(), target, hold=False)
        log_l0 = log_l0 + (rest - 0.8 * state[0] - log_l0) / delay
    return log_l0.exp().item(), state[0].item()


@pytest.mark.parametrize("delay", [1.0, 20.0, 60.0])
@pytest.mark.parametrize("target", [10.0, 60.0, 500.0])
def test_it_settles_on_the_target(delay: float, target: float) -> None:
    l0, log_lambda = simulate(2000, 2000.0, delay, target)
    assert l0 == pytest.approx(target, rel=0.01)
    assert log_lambda == pytest.approx(torch.tensor(200 / target).log().item() / 0.8, abs=0.05)


def test_hold_keeps_lambda() -> None:
    state = sparsity_target.new_state("cpu")
    for _ in range(50):
        sparsity_target.advance(state, torch.tensor(1000.0), 10.0, hold=True)
    assert state[0] == 0
    assert state[1] > 0


def test_no_active_latent_is_an_error_to_be_mended() -> None:
    state = sparsity_target.new_state("cpu")
    for _ in range(50):
        sparsity_target.advance(state, torch.tensor(0.0), 10.0, hold=False)
    assert state.isfinite().all()
    assert state[0] < -0.1


def test_the_state_is_in_checkpoints_and_a_resumed_run_goes_on_alike(tmp_path: Path) -> None:
    batches = list(planted_batches(60))
    first = make_trainer("gated", target_l0=2.0)
    for batch in batches[:30]:
        first.step(batch)
    first.save_checkpoint("30", base_path=tmp_path)
    resumed = make_trainer("gated", target_l0=2.0)
    resumed.load_trainer_state(tmp_path / "30")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "30")
    assert torch.equal(resumed.sae.l0_controller, first.sae.l0_controller)
    assert resumed.sae.l0_controller[0] != 0
    for batch in batches[30:]:
        assert torch.equal(first.step(batch).loss, resumed.step(batch).loss)


def test_the_saved_sae_has_no_trace_but_the_lambda_reached(tmp_path: Path) -> None:
    trainer = make_trainer("gated", target_l0=2.0, l1_coefficient=0.5)
    for batch in planted_batches(30):
        trainer.step(batch)
    trainer.sae.save_inference_model(tmp_path)
    assert "l0_controller" not in load_file(tmp_path / "sae_weights.safetensors")
    reached = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["l1_coefficient_reached"]
    assert reached == pytest.approx(0.5 * trainer.sae.l0_controller[0].exp().item())


@pytest.mark.parametrize("architecture", ["gated", "prolu"])
def test_a_run_lands_on_its_target_and_reports_lambda(
    small_run: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    small_run["sae"] = {
        "architecture": architecture,
        "d_in": 128,
        "d_sae": 256,
        "target_l0": 20,
        "l1_coefficient": 0.3,
        "normalize_activations": "expected_average_only_in",
    }
    small_run.update(training_tokens=204_800, n_batches_for_norm_estimate=5)  # 400 steps
    results = train(load_config(small_run), tmp_path / "run")
    assert results["l0"] == pytest.approx(20, rel=0.05)
    assert results["target_l0"] == 20
    assert results["l1_coefficient"] > 0.3


@pytest.mark.parametrize("target", [0, -3, 256, 1000])
def test_an_impossible_target_is_a_sentence(small_run: dict[str, Any], target: int) -> None:
    small_run["sae"]["target_l0"] = target
    with pytest.raises(ConfigError, match=r"target_l0.* d_sae = 256"):
        load_config(small_run)
