"""The Gated SAE against the equations of arXiv 2404.16014, written out here once more."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import sae_lens
import torch
from support.gated import D_IN, D_SAE, FORMS, N, build, data, step
from torch import Tensor

from sae_gated_plugin.architectures.gated import (
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)
from sae_gated_plugin.core.support_tensor import SupportTensor
from sae_gated_plugin.errors import ConfigError, TrainingDiverged

PARAMETERS = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")


def reference(sae: GatedTrainingSAE, x: Tensor, l1: float) -> tuple[dict[str, Tensor], Tensor]:
    """Equations 3-8 of the paper, loss terms and the gradients of their sum."""
    p = {n: getattr(sae, n).detach().clone().requires_grad_() for n in PARAMETERS}
    cfg = sae.cfg
    m = (x - p["b_dec"]) @ p["W_enc"]
    pi_gate = m + p["b_gate"]
    pi_mag = m * p["r_mag"].exp() + p["b_mag"]
    f = (pi_gate > 0).to(x.dtype) * pi_mag.clamp_min(0)
    g = pi_gate.clamp_min(0)
    frozen = cfg.aux_decoder == "frozen"
    W_aux = p["W_dec"].detach() if frozen else p["W_dec"]
    b_aux = p["b_dec"].detach() if frozen else p["b_dec"]
    weights = p["W_dec"].norm(dim=1) if cfg.decoder == "norm_weighted" else torch.ones(())
    terms = {
        "mse_loss": (f @ p["W_dec"] + p["b_dec"] - x).square().sum() / len(x),
        "l1_loss": l1 * (g * weights).sum() / len(x),
        "auxiliary_reconstruction_loss": (g @ W_aux + b_aux - x).square().sum() / len(x),
    }
    grads = dict(zip(p, torch.autograd.grad(sum(terms.values()), list(p.values()))))
    if cfg.decoder == "unit_norm":
        rows = p["W_dec"].detach()
        along = (grads["W_dec"] * rows).sum(1, keepdim=True)
        grads["W_dec"] = grads["W_dec"] - along * rows / rows.square().sum(1, keepdim=True)
    return terms, grads


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("decoder", ["unit_norm", "norm_weighted"])
@pytest.mark.parametrize("aux_decoder", ["frozen", "trainable"])
def test_loss_and_gradients_are_the_papers(backend: str, decoder: str, aux_decoder: str) -> None:
    sae = build(backend=backend, decoder=decoder, aux_decoder=aux_decoder)
    x = data()
    terms, grads = reference(sae, x, 0.7)
    output = step(sae, x)
    assert set(output.losses) == set(terms)
    for name, expected in terms.items():
        assert output.losses[name].item() == pytest.approx(expected.item(), rel=1e-10)
    assert output.loss.item() == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-10)
    output.loss.backward()
    for name, expected in grads.items():
        found = getattr(sae, name).grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", FORMS)
def test_what_the_auxiliary_term_may_move(backend: str) -> None:
    """No gradient to the decoder, but b_dec keeps the one through the encoder's input."""
    sae = build(backend=backend)
    output = step(sae, data())
    auxiliary = output.losses["auxiliary_reconstruction_loss"]
    names = ("W_dec", "b_dec", "W_enc", "b_gate", "r_mag", "b_mag")
    grads = dict(
        zip(
            names,
            torch.autograd.grad(auxiliary, [getattr(sae, n) for n in names], allow_unused=True),
        )
    )
    for untouched in ("W_dec", "r_mag", "b_mag"):
        assert grads[untouched] is None or not grads[untouched].any(), untouched
    # b_dec: exactly the encoder-side part, computed here with the decoder side held fixed.
    b_dec = sae.b_dec.detach().clone().requires_grad_()
    x, g_bias = data(), sae.b_gate.detach()
    g = ((x - b_dec) @ sae.W_enc.detach() + g_bias).clamp_min(0)
    fixed = g @ sae.W_dec.detach() + sae.b_dec.detach()
    expected = torch.autograd.grad((fixed - x).square().sum() / len(x), b_dec)[0]
    assert expected.norm() > 0.1
    torch.testing.assert_close(grads["b_dec"], expected, rtol=1e-10, atol=1e-12)
    for moved in ("W_enc", "b_gate"):
        assert grads[moved].abs().sum() > 0


def test_trainable_auxiliary_decoder_gets_a_gradient() -> None:
    sae = build(aux_decoder="trainable")
    auxiliary = step(sae, data()).losses["auxiliary_reconstruction_loss"]
    assert torch.autograd.grad(auxiliary, sae.W_dec)[0].abs().sum() > 0


def test_the_gate_is_strict() -> None:
    sae = build(backend="sparse")
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_gate.zero_()
        sae.b_gate[3] = 1e-300
        sae.b_mag.fill_(1.0)
    acts = sae.encode(data())
    assert acts[:, 3].eq(1.0).all()
    assert acts[:, :3].eq(0.0).all()  # pi_gate = 0 is closed
    assert step(sae, data()).feature_acts.to_dense().bool().sum() == N


def test_norm_weighted_and_trainable_is_saelens_own_loss() -> None:
    ours = build(decoder="norm_weighted", aux_decoder="trainable", dtype="float64")
    plain = sae_lens.GatedTrainingSAE(
        sae_lens.GatedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64")
    )
    plain.load_state_dict(ours.state_dict())
    x = data()
    expected, found = step(plain, x), step(ours, x)
    for name in expected.losses:
        assert found.losses[name].item() == pytest.approx(expected.losses[name].item(), rel=1e-10)
    expected.loss.backward()
    found.loss.backward()
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(ours, name).grad, getattr(plain, name).grad)


@pytest.mark.parametrize("backend", FORMS)
def test_lambda_keeps_its_meaning_when_the_batch_doubles(backend: str) -> None:
    sae = build(backend=backend)
    x = data()
    once, twice = step(sae, x), step(sae, torch.cat([x, x]))
    for name in once.losses:
        assert twice.losses[name].item() == pytest.approx(once.losses[name].item(), rel=1e-12)


def test_without_r_mag() -> None:
    sae = build(learn_r_mag=False)
    assert not sae.r_mag.requires_grad
    step(sae, data()).loss.backward()
    assert sae.r_mag.grad is None
    fresh = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=4, d_sae=8, learn_r_mag=False))
    assert not fresh.r_mag.any()


@pytest.mark.parametrize("backend", FORMS)
def test_untied_encoders(backend: str) -> None:
    sae = build(tie_encoders=False, backend=backend)
    with torch.no_grad():
        sae.W_mag.add_(0.3 * torch.randn(D_IN, D_SAE))
    x = data()
    pi_gate = (x - sae.b_dec) @ sae.W_enc + sae.b_gate
    pi_mag = (x - sae.b_dec) @ sae.W_mag * sae.r_mag.exp() + sae.b_mag
    expected = torch.where(pi_gate > 0, pi_mag.relu(), 0.0)
    torch.testing.assert_close(sae.encode(x), expected)
    output = step(sae, x)
    torch.testing.assert_close(output.feature_acts.to_dense(), expected.detach())
    wanted = [sae.W_mag, sae.b_mag, sae.b_dec]  # the step function gives W_enc nothing here
    found = torch.autograd.grad(output.losses["mse_loss"], wanted)
    mse = (expected @ sae.W_dec + sae.b_dec - x).square().sum() / N
    for f, e in zip(found, torch.autograd.grad(mse, wanted)):
        torch.testing.assert_close(f, e)


def test_sparsity_losses_by_name() -> None:
    x = data()
    g = ((x - (sae := build(sparsity_loss="sqrt_l1")).b_dec) @ sae.W_enc + sae.b_gate).relu()
    found = step(sae, x, l1=1.0).losses["l1_loss"]
    assert found.item() == pytest.approx(g.sqrt().sum().item() / N, rel=1e-10)
    with pytest.raises(ConfigError, match="Did you mean 'sqrt_l1'"):
        build(sparsity_loss="sqrt_l2")


# --- unit norm ------------------------------------------------------------------------------------


def norms(sae: Any) -> Tensor:
    return sae.W_dec.detach().double().norm(dim=1)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_rows_have_norm_one_after_every_step(optimizer: Any) -> None:
    sae = build("float32")
    assert (norms(sae) - 1).abs().max() < 1e-6
    optimize = optimizer(sae.parameters(), lr=0.05)
    for _ in range(5):
        step(sae.train(), data(dtype=torch.float32)).loss.backward()
        along = (sae.W_dec.grad * sae.W_dec).sum(1)
        assert along.abs().max() < 1e-5 * sae.W_dec.grad.norm()
        optimize.step()
        optimize.zero_grad()
        assert (norms(sae) - 1).abs().max() < 1e-6


def test_norm_weighted_rows_are_free_and_other_models_are_left_alone() -> None:
    sae = build("float32", decoder="norm_weighted", aux_decoder="trainable")
    other = torch.nn.Linear(3, 3)
    with torch.no_grad():
        other.weight.mul_(5)
    before = norms(sae)
    optimize = torch.optim.SGD([*sae.parameters(), *other.parameters()], lr=0.05)
    (step(sae, data(dtype=torch.float32)).loss + other.weight.sum()).backward()
    optimize.step()
    assert (norms(sae) - before).abs().max() > 1e-4
    assert other.weight.norm(dim=1).max() > 1.5


@pytest.mark.parametrize("untied", [False, True])
def test_folding_keeps_reconstructions_and_unit_norm(untied: bool) -> None:
    can_whiten = hasattr(sae_lens.SAE, "fold_activation_whitening")  # SAELens 6.52 on
    for fold in ("scale", "whiten") if can_whiten else ("scale",):
        sae = build(tie_encoders=not untied)
        x = data()
        if fold == "scale":
            expected = sae(x * 0.37) / 0.37
            sae.fold_activation_norm_scaling_factor(0.37)
        else:
            matrix = torch.randn(D_IN, D_IN, dtype=torch.float64) + 3 * torch.eye(D_IN)
            mean = torch.randn(D_IN, dtype=torch.float64)
            expected = sae((x - mean) @ matrix) @ matrix.inverse() + mean
            sae.fold_activation_whitening(mean, matrix, matrix.inverse())
        torch.testing.assert_close(sae(x), expected)
        assert (norms(sae) - 1).abs().max() < 1e-12


def test_decoder_init_norm_is_without_effect_under_unit_norm() -> None:
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=4, d_sae=8, decoder_init_norm=0.1))
    assert (norms(sae) - 1).abs().max() < 1e-6
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FORMS)
def test_gate_biases_stay_float32_under_autocast(backend: str) -> None:
    """In bfloat16, steps of 7e-5 on a bias of 0.5 would all be rounded away."""
    sae = build("float32", backend=backend)
    with torch.no_grad():
        for bias in (sae.b_gate, sae.b_mag, sae.r_mag):
            bias.fill_(0.5)
    optimizer = torch.optim.Adam(sae.parameters(), lr=7e-5)
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(sae, data(dtype=torch.float32)).loss
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for bias in (sae.b_gate, sae.b_mag, sae.r_mag):
        assert bias.dtype == torch.float32
        moved = (bias - 0.5).abs()
        assert (moved > 5e-4).float().mean() > 0.5


def test_both_forms_train_alike() -> None:
    losses = {}
    for backend in FORMS:
        sae = build("float32", backend=backend)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(30):
            loss = step(sae, data(dtype=torch.float32)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[backend] = loss.item()
    assert losses["sparse"] == pytest.approx(losses["dense"], rel=1e-4)


# --- normalisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("backend", FORMS)
def test_per_token_normalisation_reaches_every_term(normalization: str, backend: str) -> None:
    sae = build(normalize_activations=normalization, backend=backend)
    x = data() * 3 + 1
    if normalization == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        inside, back = (x - mean) / (std + 1e-5), lambda y: y * std + mean
    else:
        scale = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
        inside, back = x * scale, lambda y: y / scale
    m = (inside - sae.b_dec) @ sae.W_enc
    g = (m + sae.b_gate).relu()
    f = torch.where(g > 0, (m * sae.r_mag.exp() + sae.b_mag).relu(), 0.0)
    output = step(sae, x, l1=1.0)
    expected = {
        "mse_loss": (back(f @ sae.W_dec + sae.b_dec) - x).square().sum() / N,
        "l1_loss": g.sum() / N,
        "auxiliary_reconstruction_loss": (back(g @ sae.W_dec + sae.b_dec) - x).square().sum() / N,
    }
    for name, value in expected.items():
        assert output.losses[name].item() == pytest.approx(value.item(), rel=1e-9), name
    torch.testing.assert_close(output.feature_acts.to_dense(), f.detach())


# --- configs, hooks, errors -----------------------------------------------------------------------


def test_mixed_forms_warn_and_coherent_ones_do_not() -> None:
    with pytest.warns(UserWarning, match="mixes the two coherent forms"):
        GatedTrainingSAEConfig(d_in=4, d_sae=8, aux_decoder="trainable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GatedTrainingSAEConfig(d_in=4, d_sae=8)
        GatedTrainingSAEConfig(d_in=4, d_sae=8, aux_decoder="trainable", decoder="norm_weighted")


def test_choices_are_checked_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match="decoder is 'unit'; allowed: unit_norm, norm_weighted"):
        GatedTrainingSAEConfig(d_in=4, d_sae=8, decoder="unit")  # type: ignore[arg-type]


def test_plain_config_is_upgraded_and_left_alone() -> None:
    plain = sae_lens.GatedTrainingSAEConfig(
        d_in=4, d_sae=8, l1_coefficient=3.0, l1_warm_up_steps=7, normalize_activations="layer_norm"
    )
    sae = GatedTrainingSAE(plain)
    assert type(plain) is sae_lens.GatedTrainingSAEConfig
    assert type(sae.cfg) is GatedTrainingSAEConfig
    assert (sae.cfg.l1_coefficient, sae.cfg.l1_warm_up_steps) == (3.0, 7)
    assert sae.cfg.normalize_activations == "layer_norm"
    assert sae.cfg.aux_decoder == "frozen"
    assert sae.get_coefficients() == {"l1": (3.0, 7)}


def test_hooks_choose_the_dense_form_and_are_obeyed() -> None:
    sae = build(backend="sparse")
    seen = {}

    def double(acts: Tensor, hook: Any) -> Tensor:
        seen["acts"] = acts
        return acts * 2

    plain = step(sae, data())
    assert isinstance(plain.feature_acts, SupportTensor)
    sae.hook_sae_acts_post.add_hook(double)
    hooked = step(sae, data())
    assert seen["acts"].shape == (N, D_SAE)
    torch.testing.assert_close(hooked.feature_acts, 2 * plain.feature_acts.to_dense())
    recons = plain.sae_out - sae.b_dec
    torch.testing.assert_close(hooked.sae_out - sae.b_dec, 2 * recons)
    sae.hook_sae_acts_post.remove_hooks()
    assert isinstance(step(sae, data()).feature_acts, SupportTensor)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", FORMS)
def test_non_finite_activations_stop_training(bad: float, backend: str) -> None:
    x = data()
    x[3, 2] = bad
    x[9] = bad
    with pytest.raises(TrainingDiverged, match=r"before step 5: .*2 of 29 tokens have NaN"):
        step(build(backend=backend), x)


def test_overflow_on_finite_activations_names_the_loss() -> None:
    sae = build("float32")
    with pytest.raises(TrainingDiverged, match=r"mse_loss.* overflowed on finite activations"):
        step(sae, data(dtype=torch.float32) * 1e25)


def test_log_shows_metrics_and_histograms() -> None:
    sae = build("float32")
    assert step(sae, data(dtype=torch.float32)).metrics == {}
    metrics = step(sae, data(dtype=torch.float32), logging=True).metrics
    assert {"gamma", "gamma_centered", "fvu"} <= set(metrics)
    histograms = sae.log_histograms()
    for name in ("b_gate", "b_mag", "r_mag"):
        assert histograms[f"weights/{name}"].shape == (D_SAE,)
