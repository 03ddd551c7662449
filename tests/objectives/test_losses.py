"""Sparsity losses: values, gradients at and near zero, precision, lookup by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sae_lens.training._interruption import InterruptedException
from torch import Tensor

from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.objectives import losses
from sae_gated_plugin.objectives.losses import (
    SparsityLoss,
    get_loss,
    l1,
    lp,
    norm_weighted_l1,
    sqrt_l1,
)

BUILT_IN = [l1, sqrt_l1, lp, norm_weighted_l1]


def codes(n_tokens: int = 32, d_sae: int = 48, seed: int = 0) -> Tensor:
    """Non-negative activations (n_tokens, d_sae), most of them exactly zero, fp64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_tokens, d_sae, generator=generator, dtype=torch.float64) - 1).relu()


def norms(d_sae: int = 48) -> Tensor:
    return torch.linspace(0.5, 2.0, d_sae, dtype=torch.float64)


def test_values_are_sums_over_latents_and_means_over_tokens() -> None:
    acts, weights = codes(), norms()
    tokens = acts.tolist()
    expected = {
        l1: sum(sum(row) for row in tokens),
        norm_weighted_l1: sum(sum(f * w for f, w in zip(row, weights.tolist())) for row in tokens),
        sqrt_l1: sum(sum(f**0.5 for f in row) for row in tokens),
        lp: sum(sum(f**0.5 for f in row) for row in tokens),
    }
    for loss, total in expected.items():
        found = loss(acts, weights, 32)
        assert found.shape == ()
        assert found.item() == pytest.approx(total / 32, rel=1e-12)


def test_lp_at_one_is_l1_and_no_norms_are_norms_of_one() -> None:
    acts = codes()
    torch.testing.assert_close(lp(acts, None, 32, p=1.0), l1(acts, None, 32))
    torch.testing.assert_close(
        norm_weighted_l1(acts, None, 32), norm_weighted_l1(acts, torch.ones(48), 32)
    )


@pytest.mark.parametrize("loss", BUILT_IN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_add_nothing_and_receive_a_gradient_of_exactly_zero(
    loss: SparsityLoss, dtype: torch.dtype
) -> None:
    acts = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3e-5]], dtype=dtype, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float32, requires_grad=True)
    value = loss(acts, weights, 2)
    value.backward()
    assert acts.grad is not None
    assert acts.grad.isfinite().all()
    assert (acts.grad[acts == 0] == 0).all()
    assert acts.grad[0, 1] > 0
    assert loss(torch.zeros(4, 3), None, 4).item() == 0
    nonzero = acts.detach()[acts.detach() != 0]
    assert loss(nonzero, weights.detach()[[1, 2]], 2).item() == pytest.approx(value.item())
    if weights.grad is not None:
        assert weights.grad[0] == 0


@pytest.mark.parametrize("loss", [sqrt_l1, lp])
def test_root_penalties_of_weighted_codes_leave_the_norms_of_silent_latents_alone(
    loss: SparsityLoss,
) -> None:
    """The NaN of a root over f ‖W‖ at f = 0, which would reach W_dec through the norm."""
    W_dec = torch.randn(3, 5, requires_grad=True)
    acts = torch.tensor([[0.0, 1.0, 0.0]])
    loss(acts * W_dec.norm(dim=1), None, 1).backward()
    assert W_dec.grad is not None
    assert W_dec.grad.isfinite().all()
    assert (W_dec.grad[[0, 2]] == 0).all()
    assert (W_dec.grad[1] != 0).all()


@pytest.mark.parametrize("loss", BUILT_IN)
def test_gradients_are_those_of_the_formula(loss: SparsityLoss) -> None:
    acts = (codes() + 0.1).requires_grad_()
    weights = norms().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, w: loss(f, w, 32), (acts, weights))


@pytest.mark.parametrize("loss", BUILT_IN)
def test_doubling_the_batch_changes_neither_value_nor_step(loss: SparsityLoss) -> None:
    once = codes().requires_grad_()
    weights = norms()
    twice = torch.cat([once, once])
    a, b = loss(once, weights, 32), loss(twice, weights, 64)
    assert b.item() == pytest.approx(a.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(a, once)[0], torch.autograd.grad(b, once)[0], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("loss", BUILT_IN)
def test_active_values_alone_give_the_same_as_the_matrix(loss: SparsityLoss) -> None:
    acts, weights = codes().requires_grad_(), norms()
    rows, columns = acts.detach().nonzero(as_tuple=True)
    dense = loss(acts, weights, 32)
    sparse = loss(acts[rows, columns], weights[columns], 32)
    assert sparse.item() == pytest.approx(dense.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(sparse, acts)[0], torch.autograd.grad(dense, acts)[0]
    )


@pytest.mark.parametrize("loss", BUILT_IN)
def test_half_precision_is_summed_in_fp32(loss: SparsityLoss) -> None:
    # 4097 is no bf16 number, and 70,000 is beyond fp16.
    found = loss(torch.ones(4097, dtype=torch.bfloat16), None, 1)
    assert found.dtype == torch.float32
    assert found.item() == 4097
    assert loss(torch.ones(70_000, dtype=torch.float16), None, 1).item() == 70_000
    assert loss(torch.ones(3, dtype=torch.float64), None, 1).dtype == torch.float64


def test_the_built_ins_are_registered_by_the_hook() -> None:
    found: dict[str, SparsityLoss] = {}
    losses.register_losses(found.__setitem__)
    assert found == {
        "l1": l1,
        "sqrt_l1": sqrt_l1,
        "lp": lp,
        "norm_weighted_l1": norm_weighted_l1,
    }


def test_losses_by_name() -> None:
    assert get_loss("l1") is l1
    assert get_loss("norm_weighted_l1") is norm_weighted_l1
    acts = codes()
    root = sqrt_l1(acts, None, 32).item()
    assert get_loss("lp")(acts, None, 32).item() == pytest.approx(root, rel=1e-12)
    assert get_loss("lp_0.5")(acts, None, 32).item() == pytest.approx(root, rel=1e-12)
    assert get_loss("lp_0.9")(acts, None, 32).item() == pytest.approx(
        acts.pow(0.9).sum().item() / 32, rel=1e-12
    )


def test_a_registered_name_comes_before_the_lp_family(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_gated_plugin.plugins.bridge import registry

    monkeypatch.setitem(registry().losses, "lp_0.9", l1)
    assert get_loss("lp_0.9") is l1


def test_a_loss_found_by_name_travels_to_a_worker() -> None:
    loss = get_loss("lp_0.7")
    acts = codes()
    for copied in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert copied(acts, None, 32) == loss(acts, None, 32)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        get_loss("sqrtl1")
    text = str(caught.value)
    assert text.startswith("Unknown sparsity loss 'sqrtl1'; known: ")
    for name in ("l1", "lp", "norm_weighted_l1", "sqrt_l1"):
        assert name in text
    assert text.endswith("Did you mean 'sqrt_l1'?")
    with pytest.raises(ConfigError, match="Unknown sparsity loss 'lp_half'"):
        get_loss("lp_half")


@pytest.mark.parametrize("name", ["lp_0", "lp_-1", "lp_1.5", "lp_nan", "lp_inf"])
def test_an_exponent_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}': p must lie in \(0, 1\]"):
        get_loss(name)


def test_a_signal_that_stops_training_is_no_failure_of_the_loss() -> None:
    """SAELens's handler raises in whatever code is running when the signal comes."""

    def interrupted(*_: object) -> Tensor:
        raise InterruptedException

    with pytest.raises(InterruptedException):
        losses.penalty("theirs", interrupted, codes(), 32)
