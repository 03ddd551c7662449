"""ProLU (Taggart 2024): a thresholded code whose threshold learns by a straight-through gradient.

    m     = (x - b_dec) W_enc                           carries no bias
    f     = m  where m > 0 and m + b_enc > 0, else 0
    x_hat = f W_dec + b_dec
    loss  = |x - x_hat|^2 + lambda |f|_1

Where f is active, its gradients are
    "ste":   df/db = m, df/dm = 1 + m
    "relu":  df/db = df/dm = 1
and 0 elsewhere. The straight-through form is not scale-equivariant: normalise the activations
(`normalize_activations: expected_average_only_in`) or expect lambda and the learning of b_enc to
depend on their scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from torch import Tensor
from typing_extensions import override

from ..core.active import Active
from ..plugins.hookspecs import hookimpl
from ..plugins.records import About
from .base.code import BiasedEncoder, ThresholdedInferenceSAE
from .base.options import TrainingOptions, describe_options, option, require_choice
from .base.training_step import ThresholdedTrainingSAE

Gradient = Literal["ste", "relu"]


class _StraightThrough(torch.autograd.Function):
    """f = m on the support; its straight-through gradients. Off the support callers mask."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        ctx.b_shape = b.shape
        return m.view_as(m)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (m,) = ctx.saved_tensors
        grad_b = grads[0] * m
        return grads[0] + grad_b, grad_b.sum_to_size(ctx.b_shape)


class _LikeReLU(torch.autograd.Function):
    """f = m on the support; the gradients of ReLU(m + b)."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, b: Tensor) -> Tensor:
        ctx.b_shape = b.shape
        return m.view_as(m)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].sum_to_size(ctx.b_shape)


def prolu(m: Tensor, b: Tensor, gradient: Gradient = "ste") -> Tensor:
    """ProLU(m, b) of m (..., d_sae) and b (d_sae,): m where m > 0 and m + b > 0, else 0.

    Source: Taggart 2024, "ProLU: A Nonlinearity for Sparse Autoencoders".
    """
    return torch.where((m > 0) & (m + b > 0), _with_gradient(m, b, gradient), 0.0)


def _with_gradient(m: Tensor, b: Tensor, gradient: Gradient) -> Tensor:
    function = _StraightThrough if gradient == "ste" else _LikeReLU
    return cast(Tensor, function.apply(m, b))


class ProLUEncoder(BiasedEncoder):
    """Mixin: the ProLU code, plain or hybrid, and what folding may do to it."""

    def thresholds(self: Any) -> Tensor:
        """m > 0 and m + b > 0, strictly; the hybrid's ReLU(m + b) asks only for the second."""
        return -self.b_enc if self.cfg.hybrid else (-self.b_enc).clamp_min(0.0)

    def read_acts(self: Any, active: Active) -> tuple[Tensor, Tensor]:
        """f and m."""
        b = active.per_latent(self.b_enc)
        m = self.hook_sae_acts_pre(active.values.to(b.dtype))
        active = self.regate(active, m, self.thresholds())
        gradient = getattr(self.cfg, "gradient", None)  # None, in inference: f's own derivative
        acts = m if gradient is None else _with_gradient(m, b, gradient)
        if self.cfg.hybrid:
            acts = torch.where(b > 0, m + b, acts)
        if gradient is None:
            acts = acts.relu()  # the mask's 0 times minus infinity would be NaN
        return self.hook_sae_acts_post(active.keep(acts)), m

    def fold_activation_whitening(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in SAELens, where b_dec can absorb the mean; m has no bias that could."""
        self.require_b_dec_on_input("a ProLU SAE")
        super().fold_activation_whitening(*args, **kwargs)  # type: ignore[misc]


@dataclass
class ProLUTrainingSAEConfig(TrainingOptions, TrainingSAEConfig):
    """Configuration for training a ProLU SAE."""

    gradient: Literal["ste", "relu"] = option(  # inline: SAELens's command line resolves it
        "ste",
        'The gradient of the threshold: "ste", Taggart\'s recommendation, or "relu".',
    )
    hybrid: bool = option(
        False,
        "Plain ReLU(m + b) where b > 0, ProLU where b <= 0. Taggart does not; differs little.",
    )

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("gradient", self.gradient, ("ste", "relu"))

    @override
    @classmethod
    def architecture(cls) -> str:
        return "prolu"


@dataclass
class ProLUSAEConfig(SAEConfig):
    """Configuration of a ProLU SAE for inference."""

    hybrid: bool = option(
        False,
        "Plain ReLU(m + b) where b > 0, as in training.",
    )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "prolu"


class ProLUTrainingSAE(ProLUEncoder, ThresholdedTrainingSAE, TrainingSAE[ProLUTrainingSAEConfig]):
    """ProLU in training.

    W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_dec (d_in,), b_enc (d_sae,).
    """


class ProLUSAE(ProLUEncoder, ThresholdedInferenceSAE, SAE[ProLUSAEConfig]):
    """ProLU for inference."""


def _describe(config: Mapping[str, Any]) -> str:
    return describe_options(
        config,
        ("gradient", "ste", "straight-through gradient"),
        ("gradient", "relu", "ReLU gradient"),
        ("hybrid", True, "plain ReLU where the bias is positive"),
    )


def _as_jumprelu(sae: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m where it exceeds -b_enc; the hybrid adds b_enc where that is positive."""
    bias = sae.b_enc.relu() if sae.cfg.hybrid else torch.zeros_like(sae.b_enc)
    return sae.W_enc, bias, -sae.b_enc, sae.W_dec, sae.b_dec


@hookimpl
def register_architectures(register: Any) -> None:
    """`prolu`, for training and inference."""
    register(
        "prolu",
        training=(ProLUTrainingSAE, ProLUTrainingSAEConfig),
        inference=(ProLUSAE, ProLUSAEConfig),
        about=About("ProLU SAE (Taggart 2024)", _describe, _as_jumprelu, ("b_enc",)),
    )
