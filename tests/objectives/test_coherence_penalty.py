"""The coherence penalty against its formula written out here, and in training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from support.decoders import LargestTensor, cosine, decoder
from support.planted import D_SAE, make_trainer, planted_batches
from torch import Tensor

from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.metrics.decoder import coherence
from sae_gated_plugin.objectives.coherence_penalty import decoder_coherence

OURS = ("gated", "mlp_encoder", "prolu", "relu", "expanded")


def plain_penalty(W_dec: Tensor, cap: float) -> Tensor:
    total = W_dec.new_zeros(())
    for i, j in itertools.permutations(range(len(W_dec)), 2):
        total = total + (cosine(W_dec, i, j).abs() - cap).clamp_min(0.0).square()
    return total / len(W_dec)


@pytest.mark.parametrize("cap", [0.0, 0.1, 0.3, 0.8])
def test_the_penalty_is_its_formula_and_so_is_its_gradient(cap: float) -> None:
    W_dec = decoder().requires_grad_()
    expected = plain_penalty(W_dec, cap)
    found = decoder_coherence(W_dec, cap)
    torch.testing.assert_close(found, expected)
    assert found > 0
    (grad,) = torch.autograd.grad(found, W_dec)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, W_dec)[0])
    assert (grad * W_dec).sum(1).abs().max() < 1e-12  # orthogonal to every row


def test_gradcheck() -> None:
    W_dec = decoder(9, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: decoder_coherence(W, 0.1, seed=3, n_rows=4), W_dec)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_rows=st.integers(1, 12), cap=st.floats(0, 0.9))
def test_a_block_of_rows_is_part_of_the_full_matrix(seed: int, n_rows: int, cap: float) -> None:
    """Averaged over blocks that cover every row once, the estimates are the exact penalty."""
    W_dec = decoder(12, 5, seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    similar = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1)
    excess = (similar.abs() - cap).relu().square()
    excess.fill_diagonal_(0.0)
    expected = excess[order[:n_rows]].sum() / n_rows
    torch.testing.assert_close(decoder_coherence(W_dec, cap, seed, n_rows), expected)


def test_the_estimate_and_its_gradient_are_unbiased() -> None:
    W_dec = decoder(30, 6).requires_grad_()
    exact = decoder_coherence(W_dec, 0.2)
    (gradient,) = torch.autograd.grad(exact, W_dec)
    values, gradients = [], []
    for seed in range(3000):
        value = decoder_coherence(W_dec, 0.2, seed, n_rows=5)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, W_dec)[0])
    draws, moves = torch.stack(values), torch.stack(gradients)
    for drawn, wanted in ((draws, exact.detach()), (moves, gradient)):
        error = drawn.std(0) / math.sqrt(len(drawn))
        assert ((drawn.mean(0) - wanted).abs() < 5 * error + 1e-12).all()
    assert draws.std() > 0.02 * exact  # it is an estimate


def test_steps_draw_other_rows_and_leave_the_global_random_numbers_alone() -> None:
    W_dec = decoder(60)
    torch.manual_seed(0)
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    drawn = [decoder_coherence(W_dec, 0.0, seed, n_rows=4).item() for seed in (0, 1, 0)]
    assert torch.equal(torch.rand(3), undisturbed)
    assert drawn[0] == drawn[2] != drawn[1]


def test_opposite_rows_are_similar_and_zero_rows_are_not() -> None:
    rows = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, 0, 0]], requires_grad=True)
    penalty = decoder_coherence(rows, 0.4)
    penalty.backward()
    assert penalty.item() == pytest.approx(2 * 0.6**2 / 4)
    assert rows.grad.isfinite().all()


# --- in training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", OURS)
@pytest.mark.parametrize("norm", ["unit_norm", "norm_weighted"])
@pytest.mark.filterwarnings("ignore:decoder=.* mixes the two:UserWarning")
def test_every_architecture_adds_it_for_the_decoder_alone(architecture: str, norm: str) -> None:
    options = {"decoder": norm, "d_in": 6, "d_sae": 40}
    sae_class, config_class = get_sae_training_class(architecture)
    penalised = config_class(**options, decoder_coherence=0.7, decoder_coherence_cap=0.1)
    sae = sae_class(penalised)
    with torch.no_grad():
        sae.W_dec.copy_(decoder())
        if norm == "unit_norm":
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    x = torch.randn(64, 6)
    losses = sae.training_forward_pass(TrainStepInput(x, {"l1": 1.0}, None, 3, False)).losses
    expected = 0.7 * plain_penalty(sae.W_dec, 0.1)
    torch.testing.assert_close(losses["coherence_loss"], expected)
    grads = torch.autograd.grad(
        losses["coherence_loss"], list(sae.parameters()), allow_unused=True, materialize_grads=True
    )
    reached = {name for (name, _), grad in zip(sae.named_parameters(), grads) if grad.any()}
    assert reached == {"W_dec"}
    sae.cfg.decoder_coherence = 0.0
    without = sae.training_forward_pass(TrainStepInput(x, {"l1": 1.0}, None, 3, False)).losses
    assert set(losses) - set(without) == {"coherence_loss"}


def test_unit_norm_projection_stays_exact() -> None:
    trainer = make_trainer("gated", decoder_coherence=50.0, decoder_coherence_cap=0.0)
    for batch in planted_batches(3):
        trainer.sae.zero_grad()
        step_input = TrainStepInput(batch, {"l1": 1.0}, None, trainer.n_training_steps, False)
        trainer.sae.training_forward_pass(step_input).loss.backward()
        grad, rows = trainer.sae.W_dec.grad, trainer.sae.W_dec.detach()
        assert (grad * rows).sum(1).abs().max() < 1e-5 * grad.norm(dim=1).max()
        trainer.step(batch)
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_training_with_it_gives_a_less_coherent_decoder() -> None:
    """On 16 planted features with 64 latents, copies of a feature are what there is to gain."""
    found = {}
    for weight in (0.0, 1.0):
        trainer = make_trainer("prolu", l1_coefficient=0.3, decoder_coherence=weight)
        for batch in planted_batches(300):
            error = trainer.step(batch).losses["mse_loss"].item()
            trainer.n_training_steps += 1
        similar = coherence(trainer.sae.W_dec)
        found[weight] = (similar["coherence_top"], decoder_coherence(trainer.sae.W_dec, 0.3), error)
    assert found[1.0][0] < found[0.0][0] - 0.1
    assert found[1.0][1] < 0.5 * found[0.0][1]


def test_bad_weights_and_caps_are_sentences() -> None:
    config_class = get_sae_training_class("prolu")[1]
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"decoder_coherence is .*; it must be a number from"):
            config_class(d_in=4, d_sae=8, decoder_coherence=bad)
    for bad in (-1.5, -0.1, 1.0, 2.0, math.nan):
        with pytest.raises(ConfigError, match=r"decoder_coherence_cap is .*must lie in \[0, 1\)"):
            config_class(d_in=4, d_sae=8, decoder_coherence_cap=bad)


def test_memory_grows_with_the_block_and_not_with_the_square() -> None:
    with LargestTensor() as watched:
        decoder_coherence(torch.randn(3000, 8, requires_grad=True), 0.3).backward()
    assert watched.numel == 256 * 3000
