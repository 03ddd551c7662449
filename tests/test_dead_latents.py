"""Resampling and auxk: what is rewritten, what is reset, who gets gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import D_IN, D_SAE, make_trainer, planted_batches
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_gated_plugin import configuration, dead_latents, sweeps, training
from sae_gated_plugin.architectures.gated import GatedTrainingSAEConfig
from sae_gated_plugin.errors import ConfigError

DEAD = torch.arange(D_SAE) < 20


def trained(architecture: str, steps: int = 20, dead: Tensor = DEAD, **options: Any) -> Any:
    """A trainer after some steps, the latents in `dead` (d_sae,) killed in SAELens's eyes."""
    trainer = make_trainer(architecture, dead_feature_window=5, **options)
    for batch in planted_batches(steps):
        trainer.step(batch)
        trainer.n_training_steps += 1
    trainer.n_forward_passes_since_fired[:] = 0
    trainer.n_forward_passes_since_fired[dead] = 100
    assert torch.equal(trainer.dead_neurons, dead)
    return trainer


def state_of(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}


#: The axis that counts latents, said here once more.
AXES = {"W_enc": 1, "W_mag": 1} | dict.fromkeys(
    ("W_dec", "b_gate", "b_mag", "r_mag", "b_enc", "log_t"), 0
)


@pytest.mark.parametrize("d_sae", [D_SAE, D_IN])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gated", {}),
        ("gated", {"tie_encoders": False}),
        ("gated", {"decoder": "norm_weighted", "aux_decoder": "trainable"}),
        ("mlp_encoder", {"d_hidden": D_IN}),
        ("prolu", {}),
        ("relu", {}),
        ("expanded", {}),
    ],
)
def test_resampling_rewrites_dead_latents_and_their_moments(
    architecture: str, options: dict[str, Any], d_sae: int
) -> None:
    """And nothing else, also where d_in = d_sae and shapes tell nothing."""
    dead = torch.arange(d_sae) < d_sae * 5 // 16
    trainer = trained(
        architecture,
        dead=dead,
        d_sae=d_sae,
        dead_latents="resample",
        resample_steps=(20,),
        **options,
    )
    sae, before = trainer.sae, state_of(trainer)
    (batch,) = planted_batches(1, seed=5)
    # The pass alone: the new weights are there before the optimizer touches anything.
    step_input = TrainStepInput(batch, {"l1": 0.0}, trainer.dead_neurons, 20, False)
    sae.training_forward_pass(step_input).loss.backward()
    living = before["W_enc"][:, ~dead].norm(dim=0).mean()
    norms = sae.W_enc[:, dead].norm(dim=0)
    torch.testing.assert_close(norms, (0.2 * living).expand_as(norms))
    tokens = torch.nn.functional.normalize(batch - before["b_dec"], dim=-1)
    rows = torch.nn.functional.normalize(sae.W_dec.detach()[dead], dim=-1)
    assert ((rows @ tokens.T).max(dim=1).values > 0.9999).all()
    for name, parameter in sae.named_parameters():
        if name not in AXES:
            assert torch.equal(parameter, before[name]), name
            continue
        new, old = (t.movedim(AXES[name], 0) for t in (parameter.detach(), before[name]))
        assert torch.equal(new[~dead], old[~dead]), name
        if parameter.ndim == 1:
            assert (new[dead] == 0).all(), name

    moments = {
        name: trainer.optimizer.state[p]["exp_avg_sq"].clone()
        for name, p in sae.named_parameters()
        if p in trainer.optimizer.state
    }
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    trainer.optimizer.step()
    beta2 = trainer.cfg.adam_beta2
    for name, old in moments.items():
        if name in AXES:
            old.movedim(AXES[name], 0)[dead] = 0
        expected = beta2 * old + (1 - beta2) * gradients[name].square()
        after = trainer.optimizer.state[dict(sae.named_parameters())[name]]["exp_avg_sq"]
        torch.testing.assert_close(after, expected, msg=name)


def test_the_learning_rate_drops_and_comes_back() -> None:
    trainer = trained(
        "gated", dead_latents="resample", resample_steps=(20,), resample_warm_up_steps=10
    )
    used = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    for batch in planted_batches(15, seed=5):
        trainer.step(batch)
        trainer.n_training_steps += 1
        assert trainer.optimizer.param_groups[0]["lr"] == 3e-3
    expected = [0.1 + 0.45 * (1 - math.cos(math.pi * i / 10)) for i in range(10)] + [1.0] * 5
    assert used == pytest.approx([3e-3 * share for share in expected])
    assert expected[0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("total_steps", "expected"), [(None, [20, 30, 40]), (50, [20, 30]), (49, [20]), (39, [])]
)
def test_it_resamples_when_too_many_are_dead_then_rests_and_not_at_the_end(
    total_steps: int | None, expected: list[int]
) -> None:
    trainer = trained(
        "relu", dead_latents="resample", resample_share=0.25, resample_warm_up_steps=10
    )
    if total_steps is not None:
        trainer.cfg.total_training_samples = total_steps * trainer.cfg.train_batch_size_samples
        dead_latents.announce_the_end(trainer)
    resampled = []
    for batch in planted_batches(25, seed=5):
        trainer.n_forward_passes_since_fired[DEAD] = 100  # 20 of 64 stay dead, whatever is done
        trainer.step(batch)
        if int(trainer.sae.resampled_at) == trainer.n_training_steps:
            resampled.append(trainer.n_training_steps)
        trainer.n_training_steps += 1
    assert resampled == expected


@pytest.mark.parametrize("many", [False, True])
def test_training_says_when_it_ends(
    many: bool, small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run["dead_feature_window"] = 1
    small_run["sae"].update(
        dead_latents="resample",
        resample_share=0.001,
        resample_warm_up_steps=10,
        l1_coefficient=30.0,
    )
    resample, seen = dead_latents.resample_if_due, {}

    def spy(sae: Any, step_input: TrainStepInput) -> None:
        resample(sae, step_input)
        seen[step_input.n_training_steps] = int(sae.resampled_at)

    monkeypatch.setattr(dead_latents, "resample_if_due", spy)
    if many:
        curve = {"architecture": small_run["sae"].pop("architecture")}
        small_run["sweep"] = {"curves": [curve], "eval_tokens": 128}
        sweeps.run(sweeps.load(small_run), tmp_path)
    else:
        training.train(configuration.load(small_run), tmp_path / "run", eval_tokens=128)
    assert max(seen) == 79
    assert 50 < seen[79] <= 60


def test_nothing_dead_nothing_done() -> None:
    trainer = trained("gated", dead_latents="resample", resample_steps=(20,))
    trainer.n_forward_passes_since_fired[:] = 0
    (batch,) = planted_batches(1)
    trainer.step(batch)
    assert int(trainer.sae.resampled_at) == -1


def test_unit_norm_holds_after_resampling() -> None:
    trainer = trained("gated", dead_latents="resample", resample_steps=(20, 22))
    for batch in planted_batches(5):
        trainer.step(batch)
        trainer.n_training_steps += 1
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_resampled_latents_live_again() -> None:
    """Latents that a wrong bias has killed for good fire again, and the error falls."""

    def run(dead_latents: str) -> tuple[float, float]:
        options = {"resample_steps": (60,)} if dead_latents == "resample" else {}
        trainer = make_trainer(
            "relu", dead_feature_window=20, l1_coefficient=0.3, dead_latents=dead_latents, **options
        )
        with torch.no_grad():
            trainer.sae.b_enc[8:] = -100.0
        losses = []
        for batch in planted_batches(400):
            losses.append(trainer.step(batch).losses["mse_loss"].item())
            trainer.n_training_steps += 1
        return trainer.dead_neurons.float().mean().item(), sum(losses[-20:]) / 20

    dead, error = run("none")
    assert dead > 0.8
    fewer_dead, smaller_error = run("resample")
    assert fewer_dead < 0.5 * dead
    assert smaller_error < 0.7 * error


@pytest.mark.parametrize("architecture", ["gated", "prolu", "relu", "expanded"])
@pytest.mark.parametrize("decoder", ["unit_norm", "norm_weighted"])
@pytest.mark.filterwarnings("ignore:decoder=.* mixes the two:UserWarning")
def test_auxk_reaches_dead_latents_only(architecture: str, decoder: str) -> None:
    trainer = trained(architecture, dead_latents="auxk", decoder=decoder)
    sae = trainer.sae
    with torch.no_grad():
        (sae.b_gate if architecture == "gated" else sae.b_enc)[DEAD] = -0.5
    (batch,) = planted_batches(1, seed=5)
    step_input = TrainStepInput(batch, {"l1": 0.0}, trainer.dead_neurons, 20, False)
    loss = sae.training_forward_pass(step_input).losses["auxk_loss"]
    assert loss > 0
    loss.backward()
    for name in ("W_enc", "W_dec"):
        grad = getattr(sae, name).grad
        grad = grad.T if name == "W_enc" else grad
        assert (grad[~DEAD] == 0).all()
        assert (grad[DEAD] != 0).any(dim=1).all()
    bias = sae.b_gate if architecture == "gated" else sae.b_enc
    assert (bias.grad[~DEAD] == 0).all()
    assert (bias.grad[DEAD] != 0).any()
    if decoder == "unit_norm":
        along = (sae.W_dec.grad * sae.W_dec).sum(1)
        assert along.abs().max() < 1e-5 * sae.W_dec.grad.abs().max()


def test_auxk_is_worth_nothing_without_dead_latents() -> None:
    trainer = trained("gated", dead_latents="auxk")
    (batch,) = planted_batches(1)
    none = torch.zeros(D_SAE, dtype=torch.bool)
    output = trainer.sae.training_forward_pass(TrainStepInput(batch, {"l1": 1.0}, none, 0, False))
    assert output.losses["auxk_loss"] == 0


def test_resampling_without_a_time_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"needs resample_steps.*or resample_share"):
        GatedTrainingSAEConfig(d_in=4, d_sae=8, dead_latents="resample")
    with pytest.raises(ConfigError, match=r"resample_share is 2.*\(0, 1\)"):
        GatedTrainingSAEConfig(d_in=4, d_sae=8, dead_latents="resample", resample_share=2.0)
    with pytest.raises(
        ConfigError, match="dead_latents is 'revive'; allowed: none, resample, auxk"
    ):
        GatedTrainingSAEConfig(d_in=4, d_sae=8, dead_latents="revive")  # type: ignore[arg-type]
