"""Resampling and auxk: what is rewritten, what is reset, who gets gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from support.planted import D_IN, D_SAE, make_trainer, planted_batches
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sae_gated_plugin.architectures.gated import GatedTrainingSAEConfig
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.objectives import dead_latents
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep
from sae_gated_plugin.training.divergence import announce_the_end
from sae_gated_plugin.training.run import train

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


# --- the learning rate after resampling -----------------------------------------------------------


def warming_up(steps: int = 3, resample_steps: tuple[int, ...] = (20,)) -> Any:
    """A trainer so many steps into the warm-up, of free norms: nothing else moves its weights."""
    trainer = trained(
        "gated",
        decoder="norm_weighted",
        aux_decoder="trainable",
        dead_latents="resample",
        resample_steps=resample_steps,
        resample_warm_up_steps=10,
    )
    for batch in planted_batches(steps, seed=5):
        trainer.step(batch)
        trainer.n_training_steps += 1
    return trainer


def share_of_step(steps: int) -> float:
    return 0.1 + 0.45 * (1 - math.cos(math.pi * steps / 10)) if steps < 10 else 1.0


def assert_moved(optimizer: Any, parameter: Tensor, before: Tensor, share: float) -> None:
    """Adam's last step, from its moments, moved the parameter by a share of itself."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
    t = float(state["step"])
    mean, square = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
    full = group["lr"] * mean / (square.sqrt() + group["eps"])
    assert full.abs().max() > 1e-4
    torch.testing.assert_close(parameter.detach(), before - share * full, atol=1e-6, rtol=1e-5)


def groups(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def test_the_learning_rate_drops_and_comes_back() -> None:
    trainer = warming_up(steps=0)
    expected, seen = groups(trainer.optimizer), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(groups(optimizer)))
    for i, batch in enumerate(planted_batches(15, seed=5)):
        before = {}
        hook = trainer.optimizer.register_step_pre_hook(
            lambda *_, before=before: before.update(state_of(trainer))
        )
        trainer.step(batch)
        hook.remove()
        trainer.n_training_steps += 1
        for name, parameter in trainer.sae.named_parameters():
            assert_moved(trainer.optimizer, parameter, before[name], share_of_step(i))
    assert share_of_step(0) == pytest.approx(0.1)
    assert seen == [expected] * 15


class Nested(torch.optim.Adam):
    """torch runs the global hooks around both steps."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def raise_error(*_: Any) -> None:
    raise RuntimeError("diverged")


def in_pre_hook(trainer: Any) -> Any:
    return trainer.optimizer.register_step_pre_hook(raise_error)


def in_global_pre_hook(trainer: Any) -> Any:
    return register_optimizer_step_pre_hook(raise_error)


def in_post_hook(trainer: Any) -> Any:
    return trainer.optimizer.register_step_post_hook(raise_error)


def in_the_step(trainer: Any) -> Any:
    """Adam wants none of sparse gradients."""
    return trainer.sae.b_dec.register_post_accumulate_grad_hook(
        lambda p: setattr(p, "grad", p.grad.to_sparse())
    )


@pytest.mark.parametrize("fail", [in_pre_hook, in_global_pre_hook, in_post_hook, in_the_step])
def test_a_step_that_raises_leaves_the_learning_rate_alone(
    fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, (bad, good) = warming_up(), planted_batches(2, seed=6)
    expected, before = groups(trainer.optimizer), state_of(trainer)
    if fail is in_the_step:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    hook = fail(trainer)
    with pytest.raises(RuntimeError):
        trainer.step(bad)
    hook.remove()
    assert groups(trainer.optimizer) == expected
    if fail is not in_post_hook:
        assert all(torch.equal(p, before[name]) for name, p in trainer.sae.named_parameters())
    trainer.optimizer.zero_grad()
    trainer.lr_scheduler.step()
    before = state_of(trainer)
    trainer.step(good)
    assert groups(trainer.optimizer) == expected
    for name, parameter in trainer.sae.named_parameters():
        assert_moved(trainer.optimizer, parameter, before[name], share_of_step(3))


def own_step(trainer: Any, optimizer: Any, accumulate: int = 1) -> None:
    """A training loop of one's own: forward and backward passes, and a step."""
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    for batch in planted_batches(accumulate, seed=7):
        step_input = TrainStepInput(batch, {"l1": 1.0}, mask, trainer.n_training_steps, False)
        trainer.sae.training_forward_pass(step_input).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, Nested])
def test_each_step_is_shortened_once(optimizer_class: Any, accumulate: int) -> None:
    trainer = warming_up()
    optimizer = optimizer_class(trainer.sae.parameters(), lr=3e-3)
    expected, before = groups(optimizer), state_of(trainer)
    own_step(trainer, optimizer, accumulate)
    assert groups(optimizer) == expected
    for name, parameter in trainer.sae.named_parameters():
        assert_moved(optimizer, parameter, before[name], share_of_step(3))


def test_all_parameters_of_the_sae_and_no_others_are_slowed_down() -> None:
    """In whichever groups and optimizers they are: here with another SAE's and a layer's."""
    slow, fast = warming_up(), warming_up(resample_steps=(1000,))
    layer = torch.nn.Linear(4, 4)
    vectors, matrices = [], [*layer.parameters()]
    for trainer in (slow, fast):
        for parameter in trainer.sae.parameters():
            (vectors if parameter.ndim == 1 else matrices).append(parameter)
    one = torch.optim.Adam([{"params": vectors[:3], "lr": 1e-3}, {"params": matrices}], lr=3e-3)
    other = torch.optim.Adam(vectors[3:], lr=2e-3)
    before = [state_of(slow), state_of(fast), [p.detach().clone() for p in layer.parameters()]]
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    for batch, trainer in zip(planted_batches(2, seed=7), (slow, fast)):
        step_input = TrainStepInput(batch, {"l1": 1.0}, mask, trainer.n_training_steps, False)
        trainer.sae.training_forward_pass(step_input).loss.backward()
    layer(torch.ones(4)).sum().backward()
    one.step()
    other.step()
    held = {id(p): o for o in (one, other) for g in o.param_groups for p in g["params"]}
    for trainer, old, share in ((slow, before[0], share_of_step(3)), (fast, before[1], 1.0)):
        for name, p in trainer.sae.named_parameters():
            assert_moved(held[id(p)], p, old[name], share)
    for p, old in zip(layer.parameters(), before[2]):
        assert_moved(one, p, old, 1.0)


def test_a_step_that_a_grad_scaler_leaves_out() -> None:
    trainer = warming_up()
    optimizer = torch.optim.Adam(trainer.sae.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    expected = groups(optimizer)
    for factor, share in ((math.inf, None), (1.0, share_of_step(3))):
        before = state_of(trainer)
        (batch,) = planted_batches(1, seed=7)
        step_input = TrainStepInput(batch, {"l1": 1.0}, mask, trainer.n_training_steps, False)
        loss = trainer.sae.training_forward_pass(step_input).loss
        scaler.scale(loss).backward()
        trainer.sae.b_dec.grad.mul_(factor)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert groups(optimizer) == expected
        for name, parameter in trainer.sae.named_parameters():
            if share is None:
                assert torch.equal(parameter, before[name]), name
            else:
                assert_moved(optimizer, parameter, before[name], share)


def test_the_learning_rate_comes_back_where_dead_latents_are_no_longer_told() -> None:
    trainer = warming_up()
    trainer.n_training_steps = 40
    before = state_of(trainer)
    (batch,) = planted_batches(1, seed=7)
    step_input = TrainStepInput(batch, {"l1": 1.0}, None, 40, False)
    trainer.sae.training_forward_pass(step_input).loss.backward()
    trainer.optimizer.step()
    assert_moved(trainer.optimizer, trainer.sae.b_dec, before["b_dec"], 1.0)


# --- when -----------------------------------------------------------------------------------------


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
        announce_the_end(trainer)
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

    monkeypatch.setattr("sae_gated_plugin.objectives.dead_latents.resample_if_due", spy)
    if many:
        curve = {"architecture": small_run["sae"].pop("architecture")}
        small_run["sweep"] = {"curves": [curve], "eval_tokens": 128}
        run_sweep(load_sweep(small_run), tmp_path)
    else:
        train(load_config(small_run), tmp_path / "run", eval_tokens=128)
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
