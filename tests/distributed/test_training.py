"""Fifty steps of SAELens's trainer on two and four ranks are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from support.ranks import on_ranks
from torch import Tensor

from sae_gated_plugin.distributed.state import shard, whole
from sae_gated_plugin.training.divergence import DivergenceGuard

D_IN, D_SAE, N, STEPS = 16, 50, 64, 50

RESAMPLED = {
    "dead_latents": "resample",
    "resample_steps": (12, 30),
    "resample_share": 0.2,
    "resample_warm_up_steps": 5,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gated", {"target_l0": 1.0, **RESAMPLED}),
    ("gated", {"dead_latents": "auxk", "decoder": "norm_weighted", "aux_decoder": "trainable"}),
    ("gated", {"tie_encoders": False, "tie_b_mag": True}),
    ("mlp_encoder", {"target_l0": 1.0, **RESAMPLED}),
    ("prolu", {"target_l0": 1.0, "dead_latents": "auxk"}),
    ("relu", {"backend": "sparse", **RESAMPLED}),
    ("expanded", {}),
]


def trained(case: Any, rank: int = 0, size: int = 1, steps: int = STEPS) -> Any:
    """A trainer after its steps, by SAELens's own loop, and each step's loss."""
    name, flags = case
    sae_class, config_class = get_sae_training_class(name)
    torch.manual_seed(0)
    options = {"dtype": "float64", "l1_coefficient": 15.0, **flags}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))
    if size > 1:
        shard(sae, rank, size)
    cfg = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * N,
        device="cpu",
        autocast=False,
        lr=0.02,
        lr_end=0.002,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=20,
        n_restart_cycles=1,
        train_batch_size_samples=N,
        dead_feature_window=1,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    generator = torch.Generator().manual_seed(1)
    batches = (
        2 * torch.randn(N, D_IN, generator=generator, dtype=torch.float64) for _ in range(1000)
    )
    trainer: Any = SAETrainer(cfg, sae, batches)
    guard = DivergenceGuard(trainer)
    losses: list[float] = []

    def step(batch: Tensor) -> Any:
        output = guard.step(batch)
        losses.append(output.loss.item())
        trainer.most_dead = max(trainer.most_dead, int(trainer.dead_neurons.sum()))
        return output

    trainer.step = step
    trainer.losses, trainer.most_dead = losses, 0
    trainer.fit()
    return trainer


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
