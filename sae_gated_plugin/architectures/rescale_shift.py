"""Rescale & shift (Gated SAE paper, figure 9): a trained, frozen ReLU SAE, its shrinkage mended.

    f = 1[m + b_enc > 0] * ReLU(exp(r_mag) m + b_mag),   loss = |x - (f W_dec + b_dec)|^2

Only r_mag and b_mag learn; which latents fire stays as it was, so L0 does up to latents whose
magnitude becomes 0. Saved as `gated`, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import sae_lens
import torch
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainingSAEConfig
from torch import Tensor
from typing_extensions import override

from ..core.support import Backend
from ..errors import ConfigError
from ..plugins.hookspecs import hookimpl
from ..plugins.records import About
from ..saes.load import load_sae
from .base.options import DeadLatents, Decoder, option, require_choice
from .base.training_step import ThresholdedTrainingSAE
from .gated import GatedEncoder, GatedSAEConfig


@dataclass
class RescaleShiftTrainingSAEConfig(TrainingSAEConfig):
    """Configuration for training rescale & shift."""

    standard_sae: str = option(
        "",
        "Folder of the trained `standard` or `relu` SAE to mend; it stays frozen.",
    )
    backend: Backend = option(  # noqa: RUF009
        "auto",
        '"auto" picks the sparse or the dense form of the same computation by the density of each '
        'batch; "sparse" and "dense" are for experiments.',
    )

    # What the training step asks for, and there is no choice about here.
    decoder: ClassVar[Decoder] = "norm_weighted"
    sparsity_loss: ClassVar[str] = "l1"
    target_l0: ClassVar[float | None] = None
    matryoshka_widths: ClassVar[tuple[int, ...]] = ()
    dead_latents: ClassVar[DeadLatents] = "none"
    control: ClassVar[str] = "none"
    decoder_coherence: ClassVar[float] = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("backend", self.backend, ("auto", "dense", "sparse"))

    @override
    @classmethod
    def architecture(cls) -> str:
        return "rescale_shift"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return GatedSAEConfig


class RescaleShiftTrainingSAE(GatedEncoder, ThresholdedTrainingSAE, sae_lens.GatedTrainingSAE):
    """Rescale & shift in training: a Gated SAE's parameters, of which r_mag and b_mag learn."""

    cfg: RescaleShiftTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: RescaleShiftTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        for parameter in (self.W_enc, self.W_dec, self.b_dec, self.b_gate):
            parameter.requires_grad_(False)
        if self.W_enc.device.type != "meta":
            self._take_weights()

    @torch.no_grad()
    def _take_weights(self) -> None:
        if not self.cfg.standard_sae:
            raise ConfigError(
                "'standard_sae' is missing: rescale_shift mends a trained standard SAE; give its "
                "folder."
            )
        source = load_sae(self.cfg.standard_sae, device=str(self.device))
        if source.cfg.architecture() != "standard":
            raise ConfigError(
                f"standard_sae '{self.cfg.standard_sae}' is a {source.cfg.architecture()} SAE; "
                "rescale_shift mends standard (or relu) ones."
            )
        for name in ("d_in", "d_sae", "normalize_activations", "apply_b_dec_to_input"):
            ours, theirs = getattr(self.cfg, name), getattr(source.cfg, name)
            if ours != theirs:
                raise ConfigError(
                    f"sae.{name} is {ours!r}, but {theirs!r} in standard_sae "
                    f"'{self.cfg.standard_sae}'; set it to that."
                )
        for name in ("W_enc", "W_dec", "b_dec"):
            getattr(self, name).copy_(getattr(source, name))
        b_enc = cast(Tensor, source.b_enc)
        self.b_gate.copy_(b_enc)
        self.b_mag.copy_(b_enc)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def parameters_to_plot(self) -> tuple[str, ...]:
        return ("b_mag", "r_mag")


@hookimpl
def register_architectures(register: Any) -> None:
    """`rescale_shift`; for inference it is `gated`."""
    register(
        "rescale_shift",
        training=(RescaleShiftTrainingSAE, RescaleShiftTrainingSAEConfig),
        about=About("Rescaled and shifted ReLU SAE"),
    )
