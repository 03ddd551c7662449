"""The baselines and ablations against what they are defined by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from support.planted import D_IN, D_SAE, make_trainer, planted_batches
from torch import Tensor

from sae_gated_plugin.errors import ConfigError


def build(architecture: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(architecture)
    return sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))


def shake(sae: Any, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def copy_shared(source: Any, target: Any) -> None:
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if hasattr(target, name):
                getattr(target, name).copy_(parameter)


def loss_and_gradients(sae: Any, x: Tensor, l1: float = 0.7) -> tuple[Tensor, dict[str, Tensor]]:
    sae.zero_grad()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    output = sae.training_forward_pass(TrainStepInput(x, {"l1": l1}, dead, 0, False))
    output.loss.backward()
    grads = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    return output.loss.detach(), grads


def assert_same(one: Any, other: Any, names: tuple[str, ...]) -> None:
    (x,) = planted_batches(1)
    (loss, grads), (other_loss, other_grads) = (
        loss_and_gradients(one, x),
        loss_and_gradients(other, x),
    )
    torch.testing.assert_close(loss, other_loss)
    for name in names:
        torch.testing.assert_close(grads[name], other_grads[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_relu_with_free_norms_is_saelens_standard(backend: str) -> None:
    ours = build("relu", decoder="norm_weighted", backend=backend)
    theirs = build("standard")
    shake(ours)
    copy_shared(ours, theirs)
    assert_same(ours, theirs, ("W_enc", "W_dec", "b_enc", "b_dec"))


def test_sae_lens_gated_is_saelens_own() -> None:
    ours = build("sae_lens_gated")
    theirs = sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE))
    shake(ours)
    copy_shared(ours, theirs)
    assert_same(ours, theirs, ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec"))
    assert "training_forward_pass" not in vars(type(ours))


def test_expanded_is_gated_with_b_mag_tied() -> None:
    """t ReLU(m + b) = 1[m + b > 0] ReLU(exp(r) m + exp(r) b): the reader's proposal has no jump."""
    expanded, gated = build("expanded"), build("gated", tie_b_mag=True)
    shake(expanded)
    copy_shared(expanded, gated)
    with torch.no_grad():
        gated.b_gate.copy_(expanded.b_enc)
        gated.r_mag.copy_(expanded.log_t)
    (x,) = planted_batches(1)
    loss, grads = loss_and_gradients(expanded, x)
    other_loss, other_grads = loss_and_gradients(gated, x)
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(grads["b_enc"], other_grads["b_gate"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads["log_t"], other_grads["r_mag"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads["W_dec"], other_grads["W_dec"], rtol=1e-4, atol=1e-4)


def test_gated_with_b_mag_tied_is_saved_as_what_it_computes(tmp_path: Path) -> None:
    sae = build("gated", tie_b_mag=True)
    shake(sae)
    (x,) = planted_batches(1)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(loaded.b_mag, sae.r_mag.exp() * sae.b_gate)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def standard_run(tmp_path: Path) -> str:
    trainer = make_trainer("standard", l1_coefficient=2.0)
    for batch in planted_batches(150):
        trainer.step(batch)
    trainer.sae.save_inference_model(tmp_path / "standard")
    return str(tmp_path / "standard")


def test_rescale_shift_starts_as_the_standard_sae_and_mends_its_shrinkage(
    standard_run: str, tmp_path: Path
) -> None:
    standard = SAE.load_from_disk(standard_run)
    trainer = make_trainer("rescale_shift", lr=1e-2, standard_sae=standard_run)
    (x,) = planted_batches(1, seed=3)
    torch.testing.assert_close(trainer.sae(x), standard(x))
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    _, grads = loss_and_gradients(trainer.sae, x)
    assert set(grads) == {"r_mag", "b_mag"}
    for batch in planted_batches(200, seed=4):
        trainer.step(batch)
    for name, parameter in trainer.sae.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in grads), name

    def gamma(sae: Any) -> float:
        x_hat = sae(x).detach()
        return float(x_hat.square().sum() / (x * x_hat).sum())

    assert gamma(standard) < 0.9
    assert gamma(trainer.sae) == pytest.approx(1, abs=0.02)
    trainer.sae.save_inference_model(tmp_path / "mended")
    loaded = SAE.load_from_disk(tmp_path / "mended")
    assert loaded.cfg.architecture() == "gated"
    torch.testing.assert_close(loaded(x), trainer.sae(x), rtol=1e-5, atol=1e-5)


def test_rescale_shift_of_something_else_is_a_sentence(standard_run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'standard_sae' is missing"):
        build("rescale_shift")
    build("gated").save_inference_model(tmp_path / "gated")
    with pytest.raises(ConfigError, match="is a gated SAE; rescale_shift mends standard"):
        build("rescale_shift", standard_sae=str(tmp_path / "gated"))
    with pytest.raises(ConfigError, match=r"sae.normalize_activations is 'layer_norm', but 'none'"):
        build("rescale_shift", standard_sae=standard_run, normalize_activations="layer_norm")
