"""A Gated SAE with a two-layer encoder, proposed by readers of both papers.

    c = x - b_dec
    h = c + ReLU(c W_1 + b_1) W_2 / sqrt(d_hidden)      without `residual`: no c in the sum
    m = h W_enc                                         from here on as in gated.py

A linear encoder only approximates the sparse code min_f |x - f W_dec - b_dec|^2 + lambda |f|_1;
this one can do more, and the decoder stays linear. Losses, frozen auxiliary decoder and unit norm
are gated's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAEConfig
from torch import Tensor, nn
from typing_extensions import override

from ..errors import ConfigError
from ..plugins.hookspecs import hookimpl
from ..plugins.records import About
from .base.options import option
from .gated import GatedEncoder, GatedSAE, GatedTrainingSAE, GatedTrainingSAEConfig, describe_gated


class HiddenLayer(nn.Module):
    """From c to h: W_1 (d_in, d_hidden), b_1 (d_hidden,), W_2 (d_hidden, d_in).

    The columns of W_1 start as random directions of norm 1. With the skip W_2 starts at 0, so h is
    c; without, at W_1 transposed, scaled so that h is c in expectation. Without the square root the
    first steps of Adam would move h by lr d_hidden, farther than c is long.
    """

    def __init__(self, d_in: int, d_hidden: int, residual: bool, **factory: Any):
        super().__init__()
        self.residual = residual
        directions = nn.functional.normalize(torch.randn(d_hidden, d_in, **factory), dim=1)
        self.W_1 = nn.Parameter(directions.T.contiguous())
        self.b_1 = nn.Parameter(torch.zeros(d_hidden, **factory))
        # E[ReLU(c·w) w] is c / (2 d_in) for w uniform on the sphere.
        self.W_2 = nn.Parameter(directions * (0.0 if residual else 2 * d_in / d_hidden**0.5))

    @override
    def forward(self, c: Tensor) -> Tensor:
        out = (c @ self.W_1 + self.b_1).relu() @ self.W_2 / self.b_1.numel() ** 0.5
        return c + out if self.residual else out


class MLPEncoder(GatedEncoder):
    """Mixin: W_enc reads the hidden layer's output instead of the centred input."""

    def initialize_weights(self: Any) -> None:
        """Gated's initialisation, drawn from the same random numbers, and the hidden layer's."""
        super().initialize_weights()  # type: ignore[misc]
        cfg, factory = self.cfg, {"dtype": self.dtype, "device": self.device}
        self.mlp = HiddenLayer(cfg.d_in, cfg.d_hidden, cfg.residual, **factory)

    def encoder_input(self: Any, x: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """h, (..., d_in), from which nothing is left to subtract."""
        return self.mlp(x if b_dec is None else x - b_dec), None

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self: Any, scaling_factor: float) -> None:
        """As in gated; h shrinks by the factor that W_enc takes up."""
        self.mlp.W_1.data.mul_(scaling_factor)
        self.mlp.W_2.data.div_(scaling_factor)
        super().fold_activation_norm_scaling_factor(scaling_factor)  # type: ignore[misc]

    @torch.no_grad()
    def fold_activation_whitening(
        self: Any, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        """As in gated; h goes back through the inverse of the matrix that W_enc takes up."""
        self.require_b_dec_on_input("an mlp_encoder SAE")
        W_1, W_2 = self.mlp.W_1, self.mlp.W_2
        W_1.data.copy_(whitening_matrix @ W_1.to(whitening_matrix))
        W_2.data.copy_(W_2.to(unwhitening_matrix) @ unwhitening_matrix)
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)  # type: ignore[misc]


@dataclass
class MLPEncoderOptions:
    """The shape of the hidden layer, in training and inference configs."""

    d_hidden: int | None = option(
        None,
        "Width of the hidden layer. None becomes 4 d_in, the usual ratio of transformer MLPs "
        "(Vaswani et al. 2017); both layers then cost as much as an encoder of 8 d_in latents.",
    )
    residual: bool = option(
        True,
        "h = c + MLP(c), which starts exactly as gated; False: h = MLP(c).",
    )

    def __post_init__(self) -> None:
        d_in: int = self.d_in  # type: ignore[attr-defined]
        self.d_hidden = 4 * d_in if self.d_hidden is None else self.d_hidden
        super().__post_init__()  # type: ignore[misc]
        if self.d_hidden < 1:
            raise ConfigError(f"d_hidden is {self.d_hidden}; give 1 or more, or null for 4 d_in.")

    @classmethod
    def architecture(cls) -> str:
        """Its name, in both configs."""
        return "mlp_encoder"


@dataclass
class MLPEncoderTrainingSAEConfig(MLPEncoderOptions, GatedTrainingSAEConfig):
    """Configuration for training: gated's, and the hidden layer's."""

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return MLPEncoderSAEConfig


class MLPEncoderTrainingSAE(MLPEncoder, GatedTrainingSAE):
    """In training: gated's parameters, and `mlp`."""


@dataclass
class MLPEncoderSAEConfig(MLPEncoderOptions, SAEConfig):
    """Configuration for inference; tie_encoders as in training."""

    tie_encoders: bool = True


class MLPEncoderSAE(MLPEncoder, GatedSAE):
    """For inference; only this plugin loads it."""


def _describe(config: Mapping[str, Any]) -> str:
    skip = "no skip around the hidden layer" if config.get("residual") is False else ""
    hidden = f"{config.get('d_hidden')} hidden units"
    return ", ".join(filter(None, [hidden, skip, describe_gated(config)]))


@hookimpl
def register_architectures(register: Any) -> None:
    """`mlp_encoder`, for training and inference."""
    register(
        "mlp_encoder",
        training=(MLPEncoderTrainingSAE, MLPEncoderTrainingSAEConfig),
        inference=(MLPEncoderSAE, MLPEncoderSAEConfig),
        about=About(
            "Gated SAE with a two-layer encoder",
            _describe,
            "An mlp_encoder SAE has no JumpReLU form: its pre-activations are not linear in the "
            "input. Publish it in its native form, which needs this plugin to load.",
            ("b_gate", "b_mag", "r_mag"),
        ),
    )
