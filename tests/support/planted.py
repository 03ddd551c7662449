"""SAELens's own trainer on planted features, for tests of what happens during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

D_IN, D_SAE = 16, 64


def make_trainer(
    architecture: str, lr: float = 3e-3, dead_feature_window: int = 1000, **options: Any
) -> Any:
    """A trainer for an SAE of 16 → 64, the same weights every time."""
    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(architecture)
    return SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=512,
            lr=lr,
            lr_end=lr,
            dead_feature_window=dead_feature_window,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae_class(config_class(**{"d_in": D_IN, "d_sae": D_SAE, **options})),
        data_provider=iter(()),
    )


def planted_batches(n: int, seed: int = 1) -> Iterator[Tensor]:
    """Batches (512, 16): 16 orthonormal features, each in 8 % of tokens at strengths 2 to 4."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(9))
    features = torch.linalg.qr(square)[0]
    for _ in range(n):
        present = torch.rand(512, D_IN, generator=generator) < 0.08
        yield (present * (2 + 2 * torch.rand(512, D_IN, generator=generator))) @ features
