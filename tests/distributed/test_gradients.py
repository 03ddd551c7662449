"""Two and four ranks have one process's loss, codes and gradients."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from support.ranks import on_ranks
from torch import Tensor

from sae_gated_plugin.distributed.shards import LatentShards
from sae_gated_plugin.distributed.state import shard

D_IN, D_SAE, N = 16, 50, 64  # 50 latents: four ranks have 12, 13, 12 and 13

#: Of four ranks three have no latent of the first slice, and three none of the last.
WIDTHS = (5, 30, 40, 50)
PREFIX_FLAGS: list[dict[str, Any]] = [
    {},
    {"aux_decoder": "trainable", "decoder": "norm_weighted"},
    {"normalize_activations": "layer_norm", "target_l0": 4.0, "dead_latents": "auxk"},
]
FLAGS: dict[str, list[dict[str, Any]]] = {
    "gated": [
        {},
        {"aux_decoder": "trainable", "decoder": "norm_weighted"},
        {"aux_decoder": "trainable"},
        {"decoder": "norm_weighted"},
        {"learn_r_mag": False},
        {"tie_encoders": False},
        {"tie_b_mag": True},
        {"sparsity_loss": "sqrt_l1"},
        {"apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
        {"target_l0": 8.0},
        {"dead_latents": "auxk", "auxk_coefficient": 0.5},
        *({"matryoshka_widths": WIDTHS, **flags} for flags in PREFIX_FLAGS),
    ],
    "mlp_encoder": [{}, {"residual": False}, {"d_hidden": D_SAE}, {"tie_encoders": False}],
    "prolu": [
        {},
        {"matryoshka_widths": WIDTHS},
        {"gradient": "relu"},
        {"hybrid": True},
        {"decoder": "norm_weighted"},
    ],
    "relu": [{}, {"decoder": "norm_weighted"}, {"dead_latents": "auxk"}],
    "expanded": [{}],
    "rescale_shift": [{}],
}
CASES = [
    (name, {**flags, "backend": backend})
    for name, all_flags in FLAGS.items()
    for flags in all_flags
    for backend in ("dense", "sparse")
]
pytestmark = pytest.mark.filterwarnings("ignore:decoder=.* mixes the two:UserWarning")


def case_id(case: Any) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


@functools.cache
def standard_sae() -> str:
    """Folder of a ReLU SAE for rescale_shift to mend."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    build(("relu", {})).save_inference_model(folder)
    return folder


def build(case: Any) -> Any:
    name, flags = case
    if name == "rescale_shift":
        options = {"standard_sae": standard_sae(), **flags}
    else:
        options = {"l1_coefficient": 0.3, **flags}
    sae_class, config_class = get_sae_training_class(name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad and not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return sae.train()


def step(sae: Any, dead: Tensor) -> Any:
    """The pass of one step, with gradients; more than d_in / 2 latents are dead."""
    x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(3))
    coefficients = {"l1": 0.3} if sae.get_coefficients() else {}
    output = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, True))
    output.loss.backward()
    return output


def dead_latents() -> Tensor:
    return torch.rand(D_SAE, generator=torch.Generator().manual_seed(4)) < 0.5


def results(sae: Any, output: Any) -> dict[str, Any]:
    """Numbers of a rank, each as one process has it."""
    grads = {
        name: (sae.shards.gathered(parameter.grad, sae.latent_axes[name]))
        if name in sae.latent_axes and sae.shards.size > 1
        else parameter.grad
        for name, parameter in sae.named_parameters()
        if parameter.grad is not None
    }
    acts = sae.shards.joined_acts(output.feature_acts)
    metrics = {name: float(value) for name, value in output.metrics.items()}
    losses = {name: float(value) for name, value in output.losses.items()}
    return {
        "grads": grads,
        "acts": acts.to_dense(),
        "sae_out": output.sae_out.detach(),
        "histograms": sae.log_histograms(),
        "numbers": {**losses, **metrics, "loss": float(output.loss)},
    }


@pytest.fixture(scope="module", params=[2, 4])
def on_all_ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of every case on every rank: one fork for all of them."""
    size: int = request.param
    standard_sae()

    def work(rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for case in CASES:
            sae = shard(build(case), rank, size)
            output = step(sae, sae.shards.own(dead_latents(), 0))
            assert output.feature_acts.shape == (N, sae.shards.stop - sae.shards.start)
            found[case_id(case)] = results(sae, output)
        sae = shard(build(CASES[0]), rank, size)
        sae.cfg.backend = ("dense", "sparse")[rank % 2]
        found["mixed"] = results(sae, step(sae, sae.shards.own(dead_latents(), 0)))
        return found

    return on_ranks(size, work, tmp_path_factory.mktemp("ranks") / str(size))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loss_and_gradients_are_one_process_s(
    case: Any, on_all_ranks: list[dict[str, Any]]
) -> None:
    sae = build(case)
    expected = results(sae, step(sae, dead_latents()))
    here, *others = (rank[case_id(case)] for rank in on_all_ranks)
    assert here["grads"].keys() == expected["grads"].keys()
    for name, gradient in expected["grads"].items():
        error = (here["grads"][name] - gradient).abs().max()
        assert error <= 1e-6 * gradient.abs().max(), (name, float(error))
    assert here["numbers"] == pytest.approx(expected["numbers"], rel=1e-6, abs=1e-6)
    assert any(value for name, value in here["numbers"].items() if name == "dead_share")
    torch.testing.assert_close(here["acts"], expected["acts"], rtol=1e-6, atol=1e-6)
    for name, histogram in expected["histograms"].items():
        assert (here["histograms"][name] == histogram).all(), name
    for other in others:  # what all ranks have is alike to the bit, or it would drift apart
        assert other["numbers"] == here["numbers"]
        assert torch.equal(other["sae_out"], here["sae_out"])
        for name in expected["grads"].keys() - sae.latent_axes.keys():
            assert torch.equal(other["grads"][name], here["grads"][name]), name


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_latent_is_on_one_rank(size: int) -> None:
    shards = [LatentShards(23, rank, size) for rank in range(size)]
    assert [n for one in shards for n in range(one.start, one.stop)] == list(range(23))


def test_ranks_may_choose_different_forms(on_all_ranks: list[dict[str, Any]]) -> None:
    sae = build(CASES[0])
    expected = results(sae, step(sae, dead_latents()))
    for rank in on_all_ranks:
        torch.testing.assert_close(rank["mixed"]["acts"], expected["acts"])
        assert rank["mixed"]["numbers"] == pytest.approx(expected["numbers"], rel=1e-6, abs=1e-6)
