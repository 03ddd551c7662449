"""Small trainings of one SAE, or of a rank's share of it, on the same batches."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_gated_plugin.distributed.state import shard
from sae_gated_plugin.training.divergence import DivergenceGuard

D_IN, D_SAE, N, STEPS = 16, 50, 64, 50


def guarded(case: Any, rank: int = 0, size: int = 1, steps: int = STEPS, d_sae: int = D_SAE) -> Any:
    """SAELens's trainer of (architecture, flags), guarded as in a run, that remembers each loss."""
    name, flags = case
    sae_class, config_class = get_sae_training_class(name)
    torch.manual_seed(0)
    options = {"dtype": "float64", "l1_coefficient": 15.0, **flags}
    sae = sae_class(config_class(d_in=D_IN, d_sae=d_sae, **options))
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
    return trainer


def trained(case: Any, rank: int = 0, size: int = 1) -> Any:
    """The trainer after SAELens's own loop."""
    trainer = guarded(case, rank, size)
    trainer.fit()
    return trainer
