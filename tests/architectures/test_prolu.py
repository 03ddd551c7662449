"""ProLU against Taggart's equations, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_gated_plugin.architectures.prolu import ProLUTrainingSAE, ProLUTrainingSAEConfig, prolu
from sae_gated_plugin.errors import ConfigError

GRADIENTS = ("ste", "relu")
D_IN, D_SAE, N = 9, 31, 23


def expected(m: float, b: float, gradient: str) -> tuple[float, float, float]:
    """f, df/dm, df/db at one point."""
    if not (m > 0 and m + b > 0):
        return 0.0, 0.0, 0.0
    return (m, 1.0 + m, m) if gradient == "ste" else (m, 1.0, 1.0)


def points() -> list[tuple[float, float]]:
    """Random ones, and both sides of each boundary: m = 0 and m + b = 0."""
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(p) for p in (3 * torch.randn(200, 2, generator=generator).double()).tolist()]
    tiny = 1e-12
    for m in (-tiny, 0.0, tiny):
        pairs += [(m, b) for b in (-1.0, -tiny, 0.0, 1.0)]
    for b in (-2.0, -0.5, 0.7):
        pairs += [(-b - tiny, b), (-b, b), (-b + tiny, b)]
    return pairs


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_values_and_gradients_at_points(gradient: Any) -> None:
    for m, b in points():
        M = torch.tensor([[m]], dtype=torch.float64, requires_grad=True)
        B = torch.tensor([b], dtype=torch.float64, requires_grad=True)
        f = prolu(M, B, gradient)
        f.sum().backward()
        assert M.grad is not None
        assert B.grad is not None
        assert (f.item(), M.grad.item(), B.grad.item()) == expected(m, b, gradient), (m, b)


def build(**options: Any) -> ProLUTrainingSAE:
    torch.manual_seed(0)
    sae = ProLUTrainingSAE(
        ProLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64", **options)
    )
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(D_SAE))  # both signs
        sae.b_dec.copy_(0.2 * torch.randn(D_IN))
    return sae


def data() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(N, D_IN, generator=generator, dtype=torch.float64)


def step(sae: ProLUTrainingSAE, l1: float = 0.7) -> Any:
    return sae.training_forward_pass(TrainStepInput(data(), {"l1": l1}, None, 0, False))


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_whole_step_matches_a_hand_written_one(
    gradient: str, hybrid: bool, backend: str
) -> None:
    """Backward by the chain rule, from the equations, without autograd through the code."""
    sae = build(gradient=gradient, hybrid=hybrid, backend=backend)
    x, W, D = data(), sae.W_enc.detach(), sae.W_dec.detach()
    b, b_dec = sae.b_enc.detach(), sae.b_dec.detach()
    m = (x - b_dec) @ W
    relu_part = hybrid & (b > 0)
    active = torch.where(relu_part, m + b > 0, (m > 0) & (m + b > 0))
    f = torch.where(active, torch.where(relu_part, m + b, m), 0.0)
    x_hat = f @ D + b_dec

    output = step(sae)
    mse, l1 = (x_hat - x).square().sum() / N, 0.7 * f.sum() / N
    assert output.losses["mse_loss"].item() == pytest.approx(mse.item(), rel=1e-10)
    assert output.losses["l1_loss"].item() == pytest.approx(l1.item(), rel=1e-10)

    g_x = 2 * (x_hat - x) / N
    g_f = g_x @ D.T + 0.7 / N
    straight = torch.zeros_like(relu_part) if gradient == "relu" else ~relu_part
    g_m = torch.where(active, g_f * torch.where(straight, 1 + m, 1.0), 0.0)
    g_b = torch.where(active, g_f * torch.where(straight, m, 1.0), 0.0).sum(0)
    g_D = f.T @ g_x
    g_D = g_D - (g_D * D).sum(1, keepdim=True) * D  # rows have norm 1

    output.loss.backward()
    for name, expected_grad in {
        "b_enc": g_b,
        "W_enc": (x - b_dec).T @ g_m,
        "W_dec": g_D,
        "b_dec": g_x.sum(0) - W @ g_m.sum(0),
    }.items():
        found = getattr(sae, name).grad
        torch.testing.assert_close(found, expected_grad, rtol=1e-10, atol=1e-10, msg=name)


def test_positive_biases_act_like_zero() -> None:
    m = torch.randn(50, 8)
    assert torch.equal(prolu(m, torch.full((8,), 3.0)), prolu(m, torch.zeros(8)))


def test_histogram_of_the_bias_is_logged() -> None:
    assert build().log_histograms()["weights/b_enc"].shape == (D_SAE,)


def test_unknown_gradient_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="gradient is 'st'; allowed: ste, relu"):
        build(gradient="st")


def test_whitening_needs_b_dec_on_the_input() -> None:
    sae = build(apply_b_dec_to_input=False)
    with pytest.raises(NotImplementedError, match="apply_b_dec_to_input=False"):
        sae.fold_activation_whitening(torch.zeros(D_IN), torch.eye(D_IN), torch.eye(D_IN))


def test_warm_up_of_lambda() -> None:
    sae = build(l1_coefficient=2.0, l1_warm_up_steps=5)
    assert sae.get_coefficients() == {"l1": (2.0, 5)}
