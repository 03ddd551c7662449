"""A small Gated SAE in training, its data and one step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_gated_plugin.architectures.gated import (
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)

FORMS = ("dense", "sparse")
D_IN, D_SAE, N = 11, 37, 29


def build(dtype: str = "float64", seed: int = 0, **options: Any) -> GatedTrainingSAE:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mixed forms are wanted here
        cfg = GatedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype=dtype, **options)
    sae = GatedTrainingSAE(cfg)
    with torch.no_grad():
        for bias in (sae.b_gate, sae.b_mag, sae.r_mag):
            bias.copy_(0.3 * torch.randn(D_SAE))
        sae.b_dec.copy_(0.2 * torch.randn(D_IN))
        if cfg.decoder == "norm_weighted":
            sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
    return sae


def data(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(7), dtype=dtype)


def step(sae: Any, x: Tensor, l1: float = 0.7, logging: bool = False) -> TrainStepOutput:
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"l1": l1},
            dead_neuron_mask=None,
            n_training_steps=5,
            is_logging_step=logging,
        )
    )
