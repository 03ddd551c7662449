"""Expanded reconstruction, a reader's proposal under the Gated SAE paper: no step function.

    f     = ReLU((x - b_dec) W_enc + b_enc)
    x_hat = (t * f) W_dec + b_dec                       t > 0 learned per latent, rows of norm 1
    loss  = |x - x_hat|^2 + lambda |f|_1 + |x - (f W_dec + b_dec)|^2

with no gradient to the decoder through the last term. The penalty shrinks f, and t makes up for it.
Saved as `standard`: t goes into W_enc and b_enc, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..core.active import Active
from ..plugins.hookspecs import hookimpl
from ..plugins.records import About
from .base.options import describe_options
from .relu import ReLUTrainingSAE, ReLUTrainingSAEConfig


@dataclass
class ExpandedTrainingSAEConfig(ReLUTrainingSAEConfig):
    """Configuration for training an expanded SAE: the fields of `relu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "expanded"


class ExpandedTrainingSAE(ReLUTrainingSAE):
    """An expanded SAE in training: `relu`'s parameters and log_t (d_sae,), which starts at 0."""

    latent_axes = ReLUTrainingSAE.latent_axes | {"log_t": 0}

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.log_t = nn.Parameter(torch.zeros_like(self.b_enc))

    @override
    def read_acts(self, active: Active) -> tuple[Tensor, Tensor]:
        """t * f and m + b_enc."""
        hidden_pre = self.hook_sae_acts_pre(active.values + active.per_latent(self.b_enc))
        active = self.regate(active, hidden_pre, torch.zeros_like(self.b_enc))
        acts = hidden_pre * active.per_latent(self.log_t.exp())
        return self.hook_sae_acts_post(active.keep(acts)), hidden_pre

    @override
    def auxiliary_code(self, active: Active) -> Tensor:
        """f, which is also what the sparsity loss is taken of."""
        return active.keep(active.values + active.per_latent(self.b_enc))

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        t = state_dict.pop("log_t").exp()
        for name in ("W_enc", "b_enc"):
            state_dict[name] = state_dict[name] * t


@hookimpl
def register_architectures(register: Any) -> None:
    """`expanded`; for inference it is `standard`."""
    register(
        "expanded",
        training=(ExpandedTrainingSAE, ExpandedTrainingSAEConfig),
        about=About("SAE with expanded reconstruction", describe_options),
    )
