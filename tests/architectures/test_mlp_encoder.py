"""The two-layer encoder against its equations, written out here once more."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from support.local_hub import LocalHub
from support.planted import make_trainer, planted_batches
from torch import Tensor

from sae_gated_plugin.architectures import mlp_encoder
from sae_gated_plugin.architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_gated_plugin.architectures.mlp_encoder import (
    MLPEncoderSAE,
    MLPEncoderTrainingSAE,
    MLPEncoderTrainingSAEConfig,
)
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.core.active import encode_active
from sae_gated_plugin.core.support_tensor import SupportTensor
from sae_gated_plugin.errors import ArtifactError, ConfigError
from sae_gated_plugin.publish import convert, hub
from sae_gated_plugin.training.run import train

FORMS = ("dense", "sparse")
D_IN, D_SAE, D_HIDDEN, N = 11, 37, 19, 29

each_form = pytest.mark.parametrize("backend", FORMS)
each_shape = pytest.mark.parametrize("residual", [True, False])


def build(dtype: str = "float64", shaken: bool = True, **options: Any) -> MLPEncoderTrainingSAE:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mixed forms are wanted here
        cfg = MLPEncoderTrainingSAEConfig(
            **{"d_in": D_IN, "d_sae": D_SAE, "d_hidden": D_HIDDEN, "dtype": dtype, **options}
        )
    sae = MLPEncoderTrainingSAE(cfg)
    if shaken:
        with torch.no_grad():
            for bias in (sae.b_gate, sae.b_mag, sae.r_mag, sae.b_dec, sae.mlp.b_1):
                bias.copy_(0.3 * torch.randn_like(bias))
            sae.mlp.W_2.add_(torch.randn_like(sae.mlp.W_2))
            if cfg.decoder == "norm_weighted":
                sae.W_dec.mul_(torch.rand(cfg.d_sae, 1) + 0.5)
    return sae


def data(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(7), dtype=dtype)


def step(sae: Any, x: Tensor, l1: float = 0.7) -> TrainStepOutput:
    return sae.training_forward_pass(TrainStepInput(x, {"l1": l1}, None, 5, False))


def hidden(p: dict[str, Tensor], x: Tensor, residual: bool) -> Tensor:
    c = x - p["b_dec"]
    out = (c @ p["mlp.W_1"] + p["mlp.b_1"]).clamp_min(0) @ p["mlp.W_2"] / D_HIDDEN**0.5
    return c + out if residual else out


def reference(sae: Any, x: Tensor, l1: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss terms of the module's docstring and gated's, and the gradients of their sum."""
    cfg = sae.cfg
    p = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    m = hidden(p, x, cfg.residual) @ p["W_enc"]
    g = (m + p["b_gate"]).clamp_min(0)
    f = (g > 0).to(x.dtype) * (m * p["r_mag"].exp() + p["b_mag"]).clamp_min(0)
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


@each_form
@each_shape
@pytest.mark.parametrize(
    "options", [{}, {"decoder": "norm_weighted", "aux_decoder": "trainable"}], ids=["a", "b"]
)
def test_loss_and_every_gradient(backend: str, residual: bool, options: dict[str, Any]) -> None:
    sae, x = build(backend=backend, residual=residual, **options), data()
    terms, grads = reference(sae, x, 0.7)
    output = step(sae, x)
    assert isinstance(output.feature_acts, SupportTensor) == (backend == "sparse")
    assert set(output.losses) == set(terms)
    for name, expected in terms.items():
        assert output.losses[name].item() == pytest.approx(expected.item(), rel=1e-10)
    output.loss.backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-9, atol=1e-9, msg=name)
        assert grads[name].norm() > 1e-3, name


@each_form
@each_shape
def test_gradcheck_through_the_sparse_core_into_the_hidden_layer(
    backend: Any, residual: bool
) -> None:
    sae, x = build(residual=residual), data(6)

    def codes(x: Tensor, W_1: Tensor, b_1: Tensor, W_2: Tensor, W_enc: Tensor) -> Tensor:
        parameters = {"W_1": W_1, "b_1": b_1, "W_2": W_2}
        h = torch.func.functional_call(sae.mlp, parameters, (x,))
        active = encode_active(h, W_enc, sae.thresholds(), None, backend)
        return active.keep(active.values.square())

    inputs = [t.detach().clone().requires_grad_() for t in (x, *sae.mlp.parameters(), sae.W_enc)]
    assert torch.autograd.gradcheck(codes, inputs, eps=1e-7)


@each_form
def test_it_starts_exactly_as_gated(backend: str) -> None:
    torch.manual_seed(0)
    gated = GatedTrainingSAE(
        GatedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64", backend=backend)
    )
    ours = build(shaken=False, backend=backend)
    x = data()
    expected, found = step(gated, x), step(ours, x)
    expected.loss.backward()
    found.loss.backward()
    assert torch.equal(found.loss, expected.loss)
    for name, parameter in gated.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, msg=name)
    assert ours.mlp.W_2.grad.any()  # and from there it can move


def test_without_the_skip_it_starts_near_the_input() -> None:
    sae = build(shaken=False, residual=False, d_hidden=20_000)
    x = data()
    assert (sae.mlp(x) - x).norm() < 0.1 * x.norm()


@each_form
def test_what_the_auxiliary_term_may_move(backend: str) -> None:
    """No gradient to the decoder; the hidden layer and b_dec on the input side get theirs."""
    sae, x = build(backend=backend), data()
    auxiliary = step(sae, x).losses["auxiliary_reconstruction_loss"]
    names = [name for name, _ in sae.named_parameters()]
    found = dict(
        zip(names, torch.autograd.grad(auxiliary, list(sae.parameters()), materialize_grads=True))
    )
    for untouched in ("W_dec", "r_mag", "b_mag"):
        assert not found[untouched].any(), untouched
    p = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    g = (hidden(p, x, True) @ p["W_enc"] + p["b_gate"]).clamp_min(0)
    error = g @ p["W_dec"].detach() + p["b_dec"].detach() - x
    moved = ("b_dec", "W_enc", "b_gate", "mlp.W_1", "mlp.b_1", "mlp.W_2")
    expected = torch.autograd.grad(error.square().sum() / N, [p[name] for name in moved])
    for name, gradient in zip(moved, expected):
        assert gradient.norm() > 1e-3, name
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_penalty_moves_the_hidden_layer_through_the_gate_alone() -> None:
    sae = build()
    penalty = step(sae, data()).losses["l1_loss"]
    wanted = [sae.mlp.W_1, sae.b_gate, sae.r_mag, sae.b_mag, sae.W_dec]
    grads = torch.autograd.grad(penalty, wanted, materialize_grads=True)
    assert [bool(grad.any()) for grad in grads] == [True, True, False, False, False]


# --- training -------------------------------------------------------------------------------------


def test_unit_norm_and_target_l0_on_planted_features() -> None:
    trainer = make_trainer("mlp_encoder", target_l0=4.0)
    counts = []
    for batch in planted_batches(400):
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        norms = trainer.sae.W_dec.detach().double().norm(dim=1)
        assert (norms - 1).abs().max() < 1e-6
        counts.append((output.feature_acts.to_dense() > 0).sum().item() / len(batch))
    assert sum(counts[-20:]) / 20 == pytest.approx(4, rel=0.1)
    assert trainer.sae.mlp.W_2.any()


def test_resampling_points_the_encoder_at_the_tokens_hidden_representation() -> None:
    """Also where the hidden layer has the dictionary's shapes, it and its moments stay."""
    d_sae = 64
    trainer = make_trainer(
        "mlp_encoder",
        dead_feature_window=5,
        d_hidden=d_sae,
        dead_latents="resample",
        resample_steps=(20,),
    )
    for batch in planted_batches(20):
        trainer.step(batch)
        trainer.n_training_steps += 1
    dead = torch.arange(d_sae) < 20
    trainer.n_forward_passes_since_fired[:] = torch.where(dead, 100, 0)
    sae = trainer.sae
    with torch.no_grad():
        sae.mlp.W_2.normal_()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    (batch,) = planted_batches(1, seed=5)
    centred = torch.nn.functional.normalize(batch - sae.b_dec.detach(), dim=1)
    seen = torch.nn.functional.normalize(sae.mlp(batch - sae.b_dec).detach(), dim=1)
    assert (centred * seen).sum(1).max() < 0.95
    sae.training_forward_pass(TrainStepInput(batch, {"l1": 1.0}, trainer.dead_neurons, 20, False))
    rows = sae.W_dec.detach()[dead]
    columns = torch.nn.functional.normalize(sae.W_enc.detach()[:, dead].T, dim=1)
    tokens = (rows @ centred.T).argmax(dim=1)
    torch.testing.assert_close(rows, centred[tokens])
    torch.testing.assert_close(columns, seen[tokens])
    for name, value in sae.named_parameters():
        if name.startswith("mlp."):
            assert torch.equal(value, before[name]), name
            assert name not in sae.latent_axes


@each_form
def test_auxk_reconstructs_what_is_left_of_the_input(backend: str) -> None:
    sae, x = build(backend=backend, dead_latents="auxk", auxk_coefficient=1.0), data()
    dead = torch.arange(D_SAE) < 5  # 5 of at most D_IN // 2
    output = sae.training_forward_pass(TrainStepInput(x, {"l1": 1.0}, dead, 0, False))
    p = dict(sae.named_parameters())
    m = (hidden(p, x, True) @ p["W_enc"])[:, dead].relu()
    error = m @ p["W_dec"][dead] - (x - output.sae_out)
    torch.testing.assert_close(output.losses["auxk_loss"], error.square().sum() / N)


def test_per_token_normalisation_comes_first() -> None:
    sae, x = build(normalize_activations="layer_norm"), 3 * data() + 1
    mean, std = x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
    plain = build()
    expected = plain((x - mean) / (std + 1e-5)) * std + mean
    torch.testing.assert_close(step(sae, x).sae_out, expected)
    torch.testing.assert_close(sae(x), expected)


# --- saved, loaded, folded ------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("tied", [True, False])
def test_inference_is_the_same_function(residual: bool, tied: bool, tmp_path: Path) -> None:
    sae = build("float32", residual=residual, tie_encoders=tied)
    with torch.no_grad():
        sae.b_gate.sub_(2.5)
        if not tied:
            sae.W_mag.add_(0.1 * torch.randn_like(sae.W_mag))
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is MLPEncoderSAE
    assert (loaded.cfg.d_hidden, loaded.cfg.residual) == (D_HIDDEN, residual)
    x = data(600, torch.float32).view(2, 300, D_IN)
    expected = sae.encode(x).detach()
    assert (expected > 0).float().mean() > 0.01
    with torch.no_grad():
        assert loaded.find_active(loaded.normalized(x), "auto").support is not None
        torch.testing.assert_close(loaded.encode(x), expected)
        torch.testing.assert_close(loaded(x), sae(x))
    torch.testing.assert_close(loaded.encode(x), expected)


@each_shape
@pytest.mark.parametrize("fold", ["scale", "whiten"])
def test_folding_keeps_the_function_and_unit_norm(residual: bool, fold: str) -> None:
    if fold == "whiten" and not hasattr(sae_lens.SAE, "fold_activation_whitening"):
        pytest.skip("SAELens 6.52 on")
    sae, x = build(residual=residual), data()
    if fold == "scale":
        expected = sae(x * 0.37) / 0.37
        sae.fold_activation_norm_scaling_factor(0.37)
    else:
        matrix = torch.randn(D_IN, D_IN, dtype=torch.float64) + 3 * torch.eye(D_IN)
        mean = torch.randn(D_IN, dtype=torch.float64)
        expected = sae((x - mean) @ matrix) @ matrix.inverse() + mean
        sae.fold_activation_whitening(mean, matrix, matrix.inverse())
        refused = build(apply_b_dec_to_input=False)
        with pytest.raises(NotImplementedError, match="apply_b_dec_to_input=False; set it to"):
            refused.fold_activation_whitening(mean, matrix, matrix.inverse())
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


def test_a_run_is_trained_measured_pushed_and_loaded_by_name(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run["sae"] = {
        "architecture": "mlp_encoder",
        "d_in": 128,
        "d_sae": 256,
        "d_hidden": 256,  # like the dictionary
        "residual": False,
        "decoder_coherence": 0.5,
        "normalize_activations": "expected_average_only_in",
    }
    small_run.update(training_tokens=10_240, n_batches_for_norm_estimate=2)
    run = tmp_path / "run"
    results = train(load_config(small_run), run)
    assert results["architecture"] == "mlp_encoder"
    assert results["fvu"] < 1
    assert set(results["histograms"]) == {"log10_latent_density", "b_gate", "b_mag", "r_mag"}
    with pytest.raises(ArtifactError, match="no JumpReLU form: its pre-activations are not linear"):
        convert.export(run, tmp_path / "exported")
    assert convert.export(run, tmp_path / "same", form="native")["architecture"] == "mlp_encoder"

    with LocalHub() as server:
        api = server.patch_client(monkeypatch, tmp_path / "home")
        hub.push([run], "tester/saes", api=api)
        card = server.files("tester/saes")["README.md"].decode()
        server.patch_client(monkeypatch, tmp_path / "empty-home")
        loaded = SAE.from_pretrained("tester/saes", "run")
    assert "Gated SAE with a two-layer encoder, 256 hidden units" in card
    assert "256 hidden units, no skip around the hidden layer, " in card
    assert ", cosine similarity of decoder rows above 0.3 penalised" in card
    assert "needs `pip install sae-gated-plugin` beside SAELens" in card
    x = 10 * torch.randn(300, 128)
    torch.testing.assert_close(loaded.encode(x), SAE.load_from_disk(run).encode(x))


# --- configuration --------------------------------------------------------------------------------


def test_the_default_width_is_four_times_the_input() -> None:
    cfg = MLPEncoderTrainingSAEConfig(d_in=6, d_sae=8)
    assert cfg.d_hidden == 24
    assert cfg.get_inference_sae_cfg_dict()["d_hidden"] == 24
    assert MLPEncoderTrainingSAE(cfg).mlp.W_1.shape == (6, 24)


@pytest.mark.parametrize("width", [0, -4])
def test_an_impossible_width_is_a_sentence(small_run: dict[str, Any], width: int) -> None:
    small_run["sae"].update(architecture="mlp_encoder", d_hidden=width)
    with pytest.raises(ConfigError, match=f"d_hidden is {width}; give 1 or more, or null"):
        load_config(small_run)


def test_register_hook_is_a_plugin_hook() -> None:
    names: list[str] = []
    mlp_encoder.register_architectures(lambda name, **_: names.append(name))
    assert names == ["mlp_encoder"]
