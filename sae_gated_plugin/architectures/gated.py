"""The Gated SAE of Rajamanoharan et al. 2024 (arXiv 2404.16014 v2), exactly.

    m     = (x - b_dec) W_enc                           one matmul serves both paths
    f     = 1[m + b_gate > 0] * ReLU(exp(r_mag) m + b_mag)
    x_hat = f W_dec + b_dec                             rows of W_dec have norm 1
    g     = ReLU(m + b_gate)
    loss  = |x - x_hat|^2 + lambda |g|_1 + |x - (g W_dec + b_dec)|^2

with no gradient to W_dec and b_dec through the last term's decode. Squared errors are summed over
d_in and averaged over tokens, so lambda here is d_in times the paper's.

SAELens's own `gated` trains the auxiliary decoder and weights the penalty by decoder norms;
`aux_decoder="trainable", decoder="norm_weighted"` gives that loss again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import sae_lens
import torch
from sae_lens.saes.sae import SAEConfig
from torch import Tensor, nn
from typing_extensions import override

from ..core.active import Active
from ..plugins.hookspecs import hookimpl
from ..plugins.records import About
from .base.code import ThresholdedInferenceSAE, ThresholdedSAE
from .base.options import TrainingOptions, describe_options, option, require_choice, upgrade_config
from .base.training_step import ThresholdedTrainingSAE
from .saelens_gated import warn_when_constructed, warn_when_upgraded


class GatedEncoder(ThresholdedSAE):
    """Mixin: the gate and the magnitude, which has an encoder W_mag only where untied."""

    latent_axes = ThresholdedSAE.latent_axes | {"W_mag": 1, "b_gate": 0, "b_mag": 0, "r_mag": 0}

    def initialize_weights(self: Any) -> None:
        """SAELens's initialisation; untied encoders start alike."""
        super().initialize_weights()  # type: ignore[misc]
        if not getattr(self.cfg, "tie_encoders", True):
            self.W_mag = nn.Parameter(self.W_enc.detach().clone())

    def thresholds(self: Any) -> Tensor:
        """m + b_gate > 0, strictly."""
        return -self.b_gate

    def read_acts(self: Any, active: Active) -> tuple[Tensor, Tensor]:
        """f and the magnitude's pre-activation."""
        W_mag = getattr(self, "W_mag", None)
        m = active.values if W_mag is None else active.project(W_mag)
        scale = active.per_latent(self.r_mag.exp())
        shift = active.per_latent(self.magnitude_shift())
        pi_mag = self.hook_sae_acts_pre(scale * m + shift)
        return self.hook_sae_acts_post(active.keep(pi_mag.relu())), pi_mag

    def magnitude_shift(self: Any) -> Tensor:
        """b_mag, (d_sae,)."""
        return self.b_mag

    def fold_W_dec_norm(self: Any) -> None:
        """As in SAELens, and what goes into W_enc goes into W_mag too."""
        if hasattr(self, "W_mag"):
            self.W_mag.data.mul_(self.get_W_dec_norm())
        super().fold_W_dec_norm()  # type: ignore[misc]

    def fold_activation_norm_scaling_factor(self: Any, scaling_factor: float) -> None:
        """As in SAELens, and what goes into W_enc goes into W_mag too."""
        if hasattr(self, "W_mag"):
            self.W_mag.data.mul_(scaling_factor)
        super().fold_activation_norm_scaling_factor(scaling_factor)  # type: ignore[misc]

    @torch.no_grad()
    def fold_activation_whitening(
        self: Any, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        """As in SAELens, and what goes into W_enc goes into W_mag too."""
        if hasattr(self, "W_mag"):
            self.require_b_dec_on_input("untied encoders")
            folded = whitening_matrix @ self.W_mag.to(whitening_matrix)
            self.W_mag.data.copy_(folded)
        super().fold_activation_whitening(  # type: ignore[misc]
            mean, whitening_matrix, unwhitening_matrix
        )


@dataclass
class GatedTrainingSAEConfig(TrainingOptions, sae_lens.GatedTrainingSAEConfig):
    """Configuration for training a Gated SAE. Without the flags below it is the paper's."""

    aux_decoder: Literal["frozen", "trainable"] = option(
        "frozen",
        'With "frozen" (the paper) the decoder gets no gradient from the auxiliary '
        'reconstruction; with "trainable" it gets one, which the paper found worse (figure 8).',
    )
    learn_r_mag: bool = option(
        True,
        "Whether the magnitude's rescaling is learned, as in the paper; without it r_mag stays "
        "0, slightly worse (figure 8).",
    )
    tie_encoders: bool = option(
        True,
        "Whether gate and magnitude share W_enc up to exp(r_mag), as in the paper; untied is "
        "slightly worse (figure 8) and is saved as `gated_untied`, which only this plugin "
        "loads.",
    )
    tie_b_mag: bool = option(
        False,
        "Whether b_mag is exp(r_mag) b_gate, which takes the jump out of the code: a ReLU on "
        "rescaled gate pre-activations. The paper does not.",
    )

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("aux_decoder", self.aux_decoder, ("frozen", "trainable"))
        if (self.decoder == "unit_norm") != (self.aux_decoder == "frozen"):
            warnings.warn(
                f"decoder='{self.decoder}' with aux_decoder='{self.aux_decoder}' mixes the two "
                "coherent forms of the Gated SAE, unit_norm + frozen (the paper's) and "
                "norm_weighted + trainable; either does better than a mixture.",
                stacklevel=3,
            )

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return GatedSAEConfig if self.tie_encoders else GatedUntiedSAEConfig

    @override
    @classmethod
    def from_sae_runner_config(cls, cfg: Any) -> Any:
        """As in SAELens, which however refuses a runner that was given its own plain config."""
        cfg = copy.copy(cfg)
        cfg.sae = upgrade_config(cfg.sae, cls)
        return super().from_sae_runner_config(cfg)


class GatedTrainingSAE(GatedEncoder, ThresholdedTrainingSAE, sae_lens.GatedTrainingSAE):
    """The Gated SAE in training.

    W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_dec (d_in,), b_gate, b_mag, r_mag (d_sae,); untied
    also W_mag (d_in, d_sae).
    """

    cfg: GatedTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: sae_lens.GatedTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(upgrade_config(cfg, GatedTrainingSAEConfig), use_error_term)
        self.aux_decoder_frozen = self.cfg.aux_decoder == "frozen"

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.r_mag.requires_grad_(self.cfg.learn_r_mag)
        self.b_mag.requires_grad_(not self.cfg.tie_b_mag)

    @override
    def auxiliary_code(self, active: Active) -> Tensor:
        """ReLU(m + b_gate), which is also what the sparsity loss is taken of."""
        return active.keep(active.values + active.per_latent(self.b_gate))

    @override
    def magnitude_shift(self) -> Tensor:
        return self.r_mag.exp() * self.b_gate if self.cfg.tie_b_mag else self.b_mag

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["b_mag"] = self.magnitude_shift().detach().contiguous()


@dataclass
class GatedSAEConfig(sae_lens.GatedSAEConfig):
    """Configuration of a Gated SAE for inference: SAELens's own, field for field."""


class GatedSAE(GatedEncoder, ThresholdedInferenceSAE, sae_lens.GatedSAE):
    """The Gated SAE for inference: SAELens's parameters and numbers, one matmul instead of two."""


@dataclass
class GatedUntiedSAEConfig(SAEConfig):
    """Configuration of a Gated SAE with two encoders, for inference."""

    tie_encoders: ClassVar[bool] = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "gated_untied"


class GatedUntiedSAE(GatedSAE):
    """A Gated SAE with an encoder for the gate (W_enc) and one for the magnitude (W_mag)."""


def describe_gated(config: Mapping[str, Any]) -> str:
    """Its options in words, for `About`."""
    return describe_options(
        config,
        ("aux_decoder", "frozen", "frozen auxiliary decoder"),
        ("aux_decoder", "trainable", "trainable auxiliary decoder"),
        ("learn_r_mag", False, "no learned rescaling"),
        ("tie_encoders", False, "two encoders"),
        ("tie_b_mag", True, "b_mag tied to the gate's bias"),
    )


def _as_jumprelu(sae: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """exp(r_mag) m + b_mag, where it exceeds b_mag - exp(r_mag) b_gate: there m + b_gate is 0."""
    scale = sae.r_mag.exp()
    return sae.W_enc * scale, sae.b_mag, sae.b_mag - scale * sae.b_gate, sae.W_dec, sae.b_dec


@hookimpl
def register_architectures(register: Any) -> None:
    """`gated` replaces SAELens's own; the untied form has a name of its own for inference."""
    warn_when_constructed()
    warn_when_upgraded()
    register(
        "gated",
        training=(GatedTrainingSAE, GatedTrainingSAEConfig),
        inference=(GatedSAE, GatedSAEConfig),
        replaces="sae_lens",
        about=About(
            "Gated SAE (Rajamanoharan et al. 2024)",
            describe_gated,
            _as_jumprelu,
            ("b_gate", "b_mag", "r_mag"),
        ),
    )
    register(
        "gated_untied",
        inference=(GatedUntiedSAE, GatedUntiedSAEConfig),
        about=About(
            "Gated SAE with two encoders",
            describe_gated,
            "An untied Gated SAE has no JumpReLU form: its gate and its magnitude read different "
            "encoders. Publish it in its native form.",
            ("b_gate", "b_mag", "r_mag"),
        ),
    )
