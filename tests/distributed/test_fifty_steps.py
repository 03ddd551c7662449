"""Fifty steps of SAELens's trainer on two and four ranks are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from support.sharded import D_IN, STEPS, N, trained
from torch import Tensor

from sae_gated_plugin.distributed.state import whole

RESAMPLED = {
    "dead_latents": "resample",
    "resample_steps": (12, 30),
    "resample_share": 0.2,
    "resample_warm_up_steps": 5,
}
#: Not sqrt_l1, whose gradient is infinite at 0: one process's own steps differ by 2 % after fifty
#: where W_enc began 1e-15 larger. `test_gradients.py` has it, for one step.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gated", {"target_l0": 1.0, **RESAMPLED}),
    ("gated", {"dead_latents": "auxk", "decoder": "norm_weighted", "aux_decoder": "trainable"}),
    ("gated", {"tie_encoders": False, "tie_b_mag": True, "l1_coefficient": 3.0}),
    ("gated", {"learn_r_mag": False, "apply_b_dec_to_input": False, "l1_coefficient": 3.0}),
    ("gated", {"aux_decoder": "trainable", "normalize_activations": "layer_norm", "target_l0": 2}),
    ("gated", {"decoder": "norm_weighted", "l1_coefficient": 3.0}),
    ("mlp_encoder", {"target_l0": 1.0, **RESAMPLED}),
    ("prolu", {"target_l0": 1.0, "dead_latents": "auxk"}),
    ("prolu", {"gradient": "relu", "l1_coefficient": 3.0}),
    ("prolu", {"hybrid": True, "decoder": "norm_weighted", "l1_coefficient": 3.0}),
    ("relu", {"backend": "sparse", **RESAMPLED}),
    ("expanded", {"l1_coefficient": 3.0}),
    ("gated", {"matryoshka_widths": (5, 20, 50), "target_l0": 1.0, **RESAMPLED}),
]


pytestmark = pytest.mark.filterwarnings("ignore:decoder=.* mixes the two:UserWarning")


def numbers(trainer: Any) -> dict[str, Tensor]:
    """All that one process has at the end."""
    sae = trainer.sae
    moments = {
        f"{name}.{key}": value.clone()
        for (name, _), state in zip(sae.named_parameters(), trainer.optimizer.state.values())
        for key, value in state.items()
    }
    counts = {
        "frequency": trainer.act_freq_scores,
        "since_fired": trainer.n_forward_passes_since_fired,
        "losses": torch.tensor(trainer.losses, dtype=torch.float64),
    }
    return {**{k: v.detach().clone() for k, v in sae.state_dict().items()}, **moments, **counts}


def case_id(case: Any) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


@pytest.fixture(scope="module", params=[2, 4])
def on_all_ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    size: int = request.param

    def work(rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for case in CASES:
            trainer = trained(case, rank, size)
            alike = {
                name: parameter.detach().clone()
                for name, parameter in trainer.sae.named_parameters()
                if name not in trainer.sae.latent_axes
            }
            with whole(trainer.sae, trainer) as first:
                found[case_id(case)] = (alike, numbers(trainer) if first else trainer.losses)
        return found

    return on_ranks(size, work, tmp_path_factory.mktemp("ranks") / str(size))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_fifty_steps(case: Any, on_all_ranks: list[Any]) -> None:
    trainer = trained(case)
    expected, here = numbers(trainer), on_all_ranks[0][case_id(case)][1]
    assert trainer.act_freq_scores.sum() > 0.02 * STEPS * N  # else there was little to learn
    assert here.keys() == expected.keys()
    for name, value in expected.items():
        error = (here[name] - value).abs().max()
        assert error <= 1e-6 * max(1.0, float(value.abs().max())), (name, float(error))
    for alike, losses in (rank[case_id(case)] for rank in on_all_ranks[1:]):
        assert losses == here["losses"].tolist()
        assert alike
        assert all(torch.equal(alike[name], here[name]) for name in alike)
    what = case[1].get("dead_latents")
    if what == "resample":
        assert trainer.sae.resampled_at >= 12
    if what == "auxk":
        assert trainer.most_dead > D_IN // 2  # so that the largest are chosen
