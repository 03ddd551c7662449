"""Unit norm belongs to the module: it holds whatever became of the object and its parameters."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from support.planted import D_IN, D_SAE, planted_batches
from torch import Tensor, nn

from sae_gated_plugin.objectives import optimizer_hooks

ARCHITECTURES = ["gated", "mlp_encoder", "prolu", "relu", "expanded"]


def build(architecture: str = "gated", **options: Any) -> Any:
    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(architecture)
    return sae_class(config_class(**{"d_in": D_IN, "d_sae": D_SAE, **options}))


def norm_error(sae: Any) -> float:
    return (sae.W_dec.detach().double().norm(dim=1) - 1).abs().max().item()


def backward(sae: Any, batch: Tensor, step: int = 0) -> None:
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    sae.training_forward_pass(TrainStepInput(batch, {"l1": 0.1}, dead, step, False)).loss.backward()


def steps_of_ones_own(sae: Any) -> Iterator[float]:
    """A plain loop, in which nobody calls `train()`; yields the norms' error after each step."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05)
    for step, batch in enumerate(planted_batches(20)):
        backward(sae, batch, step)
        along = (sae.W_dec.grad * sae.W_dec).sum(1)
        assert along.abs().max() < 1e-5 * sae.W_dec.grad.norm()  # projected
        optimizer.step()
        optimizer.zero_grad()
        yield norm_error(sae)


# --- what may become of an SAE --------------------------------------------------------------------


def pickled(sae: Any) -> Any:
    return pickle.loads(pickle.dumps(sae))


def saved_by_torch(sae: Any) -> Any:
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(sae: Any) -> Any:
    """From the meta device, where parameters are new objects, and filled again."""
    weights = copy.deepcopy(sae.state_dict())
    sae = sae.to("meta").to_empty(device="cpu")
    sae.load_state_dict(weights)
    return sae


def assigned(sae: Any) -> Any:
    sae.load_state_dict(copy.deepcopy(sae.state_dict()), assign=True)
    return sae


def replaced(sae: Any) -> Any:
    sae.W_dec = nn.Parameter(sae.W_dec.detach().clone())
    return sae


def converted(sae: Any) -> Any:
    """As some users set it, moves make new parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return sae.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def swapped(sae: Any) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return sae.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


WAYS = [copy.deepcopy, copy.copy, pickled, saved_by_torch, emptied, assigned, replaced, converted]


@pytest.mark.parametrize("way", [*WAYS, swapped])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unit_norm_holds(architecture: str, way: Callable[[Any], Any]) -> None:
    sae = way(build(architecture))
    before = sae.W_dec.detach().clone()
    for error in steps_of_ones_own(sae):
        assert error < 1e-6
    assert not torch.allclose(sae.W_dec, before, atol=0.01)


@pytest.mark.parametrize("way", [*WAYS, swapped])
def test_it_holds_in_the_middle_of_a_training(way: Callable[[Any], Any]) -> None:
    sae = build()
    for _ in steps_of_ones_own(sae):
        pass
    again = way(sae)
    for error in steps_of_ones_own(again):
        assert error < 1e-6


def test_wrapped_and_by_two_optimizers_in_turn() -> None:
    sae = build()
    wrapped = nn.Sequential(sae)
    first, second = (torch.optim.AdamW(wrapped.parameters(), lr=0.05) for _ in range(2))
    for i, batch in enumerate(planted_batches(6)):
        backward(sae, batch)
        (first, second)[i % 2].step()
        wrapped.zero_grad()
        assert norm_error(sae) < 1e-6


def test_original_and_copy_are_trained_apart() -> None:
    """The copy learns what the original would have; the original stays."""
    original = build()
    other = copy.deepcopy(original)
    weights = copy.deepcopy(original.state_dict())
    list(steps_of_ones_own(other))
    for name, value in original.state_dict().items():
        assert torch.equal(value, weights[name]), name
    list(steps_of_ones_own(original))
    for name, value in original.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_a_copy_normalises_by_statistics_of_its_own(
    normalization: str, way: Callable[[Any], Any]
) -> None:
    original = build(normalize_activations=normalization)
    other = way(original)
    x, y = torch.randn(2, 8, D_IN)
    expected = original.process_sae_in(x), other.process_sae_in(y)
    original.process_sae_in(x)
    other.process_sae_in(y)
    one = original.run_time_activation_norm_fn_out(expected[0])
    two = other.run_time_activation_norm_fn_out(expected[1])
    torch.testing.assert_close(one, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_reads_attention_heads(way: Callable[[Any], Any]) -> None:
    original = build()
    original.turn_on_forward_pass_hook_z_reshaping()
    heads = torch.randn(8, 4, D_IN // 4)
    expected = original(heads)
    torch.testing.assert_close(way(original)(heads), expected)


def test_a_resampled_copy_warms_up() -> None:
    options = {"dead_latents": "resample", "resample_steps": (0,), "resample_warm_up_steps": 10}
    results: list[Tensor] = []
    for way in (lambda sae: sae, copy.deepcopy, pickled):
        sae = build(**options)
        dead = torch.arange(D_SAE) < 20
        (batch,) = planted_batches(1)
        sae.training_forward_pass(TrainStepInput(batch, {"l1": 0.1}, dead, 0, False))
        sae = way(sae)
        list(steps_of_ones_own(sae))
        results.append(sae.W_enc.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- who is watched -------------------------------------------------------------------------------


def test_nobody_is_kept_alive() -> None:
    sae = build()
    list(steps_of_ones_own(sae))
    gone = weakref.ref(sae)
    assert sae in optimizer_hooks._saes
    del sae
    gc.collect()
    assert gone() is None


def test_a_parameter_taken_out_of_the_sae_is_left_alone() -> None:
    sae = build()
    old = sae.W_dec
    sae.W_dec = nn.Parameter(old.detach().clone())
    optimizer = torch.optim.SGD([old], lr=1.0)
    old.grad = torch.ones_like(old)
    optimizer.step()
    assert (old.norm(dim=1) - 1).abs().max() > 0.1


def test_free_norms_stay_free_in_copies() -> None:
    sae = copy.deepcopy(build(decoder="norm_weighted", aux_decoder="trainable"))
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05)
    before = sae.W_dec.detach().norm(dim=1)
    for batch in planted_batches(3):
        backward(sae, batch)
        optimizer.step()
    assert (sae.W_dec.detach().norm(dim=1) - before).abs().max() > 0.01
