"""What Gated and ProLU are compared with.

`relu`: the standard SAE as both papers train it, f = ReLU(m + b_enc) on a unit-norm decoder, with
L1 (Rajamanoharan et al. 2024), √L1 (Taggart 2024) or any other registered sparsity loss. SAELens's
own `standard` penalises activations times decoder norms instead; `decoder="norm_weighted"` here is
the same. Saved as `standard`, so that plain SAELens loads it.

`sae_lens_gated`: SAELens's built-in Gated SAE, untouched, under a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sae_lens
import torch
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainingSAEConfig
from torch import Tensor
from typing_extensions import override

from ..core.active import Active
from ..plugins.hookspecs import hookimpl
from ..plugins.records import About
from .base.code import BiasedEncoder
from .base.options import TrainingOptions, describe_options
from .base.training_step import ThresholdedTrainingSAE


@dataclass
class ReLUTrainingSAEConfig(TrainingOptions, TrainingSAEConfig):
    """Configuration for training a ReLU SAE."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "relu"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return sae_lens.StandardSAEConfig


class ReLUTrainingSAE(BiasedEncoder, ThresholdedTrainingSAE, TrainingSAE[ReLUTrainingSAEConfig]):
    """A ReLU SAE in training: W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_dec (d_in,), b_enc."""

    @override
    def thresholds(self) -> Tensor:
        """m + b_enc > 0, strictly."""
        return -self.b_enc

    @override
    def read_acts(self, active: Active) -> tuple[Tensor, Tensor]:
        """f and m + b_enc."""
        hidden_pre = self.hook_sae_acts_pre(active.values + active.per_latent(self.b_enc))
        active = self.regate(active, hidden_pre, torch.zeros_like(self.b_enc))
        return self.hook_sae_acts_post(active.keep(hidden_pre)), hidden_pre


@dataclass
class SAELensGatedTrainingSAEConfig(sae_lens.GatedTrainingSAEConfig):
    """Configuration for training SAELens's built-in Gated SAE: its own, under another name."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sae_lens_gated"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return sae_lens.GatedSAEConfig


class SAELensGatedTrainingSAE(sae_lens.GatedTrainingSAE):
    """SAELens's built-in Gated SAE in training, nothing added."""


@hookimpl
def register_architectures(register: Any) -> None:
    """`relu` and `sae_lens_gated`; for inference they are `standard` and `gated`."""
    register(
        "relu",
        training=(ReLUTrainingSAE, ReLUTrainingSAEConfig),
        about=About("ReLU SAE", describe_options),
    )
    register(
        "sae_lens_gated",
        training=(SAELensGatedTrainingSAE, SAELensGatedTrainingSAEConfig),
        about=About("SAELens's built-in Gated SAE"),
    )
