"""Encoding and decoding with a threshold: what training and inference share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.active import Active, decode_matrix, dense_form, encode_active
from ...core.cost import MIN_TOKENS
from ...core.support import Backend
from ...distributed.shards import WHOLE, LatentShards


class ThresholdedSAE:
    """Mixin: the encoder, for training and inference classes alike."""

    #: Per-latent parameters by name → the axis that counts latents. A subclass adds its own; an SAE
    #: need not have all. Shapes cannot tell, for d_in may be d_sae.
    latent_axes: ClassVar[dict[str, int]] = {"W_enc": 1, "W_dec": 0}

    #: Which of its latents are in this process; `distributed.state.shard` sets another.
    shards: LatentShards = WHOLE

    def thresholds(self) -> Tensor:
        """(d_sae,): a latent is active where m exceeds this."""
        raise NotImplementedError

    def read_acts(self, active: Active) -> tuple[Tensor, Tensor]:
        """Feature activations and the pre-activations that `hook_sae_acts_pre` sees.

        Both have the shape of `active.values`; the activations are >= 0, and 0 off the support.
        """
        raise NotImplementedError

    def encoder_input(self: Any, x: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What W_enc is applied to, (..., d_in), and what is still to be subtracted from it.

        x: (..., d_in), normalised; b_dec: (d_in,), or None where it has been subtracted already.
        """
        return x, b_dec

    def require_b_dec_on_input(self: Any, what: str) -> None:
        """Raise NotImplementedError where b_dec cannot absorb the mean of a whitening."""
        if not self.cfg.apply_b_dec_to_input:
            raise NotImplementedError(
                f"Whitening cannot be folded into {what} with apply_b_dec_to_input=False; "
                "set it to True."
            )

    def encode_densely(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature activations and hidden pre-activations, both (..., d_sae), with one matmul."""
        sae_in, _ = self.encoder_input(self.process_sae_in(x), None)
        return self.read_acts(dense_form(sae_in @ self.W_enc, self.thresholds(), sae_in))

    def regate(self: Any, active: Active, hidden_pre: Tensor, thresholds: Tensor) -> Active:
        """`active` where hidden_pre, which hooks have seen, exceeds `thresholds` (d_sae,).

        For codes whose hidden pre-activations decide what is active: hooks may have changed them.
        """
        if not is_hooked(self.hook_sae_acts_pre):
            return active
        return dense_form(hidden_pre, thresholds, active.x, active.b_dec)

    def normalized(self: Any, x: Tensor) -> Tensor:
        """x (..., d_in) after SAELens's per-token normalisation.

        As `process_sae_in`, but b_dec is subtracted by the encoder, whose gradient for it is cheap;
        subtracted here it would cost an N x d_in product.
        """
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x)

    def find_active(self: Any, x: Tensor, backend: Backend) -> Active:
        """The active entries for x (..., d_in), normalised.

        Hooks on the activations want whole matrices, so they choose the dense form.
        """
        if is_hooked(self.hook_sae_acts_pre, self.hook_sae_acts_post):
            backend = "dense"
        x, b_dec = self.encoder_input(x, self.b_dec if self.cfg.apply_b_dec_to_input else None)
        x, b_dec = self.shards.same(x), None if b_dec is None else self.shards.same(b_dec)
        return encode_active(x, self.W_enc, self.thresholds(), b_dec, backend)


class BiasedEncoder(ThresholdedSAE):
    """Mixin: one bias per latent, `b_enc`."""

    latent_axes = ThresholdedSAE.latent_axes | {"b_enc": 0}
    b_enc: nn.Parameter

    def initialize_weights(self: Any) -> None:
        """SAELens's initialisation, and b_enc = 0."""
        super().initialize_weights()  # type: ignore[misc]
        zeros = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(zeros)


class ThresholdedInferenceSAE(ThresholdedSAE):
    """Mixin: inference with one matmul, and on the active latents alone where few are."""

    def encode(self: Any, x: Tensor) -> Tensor:
        """Feature activations, (..., d_sae).

        Plain dense operations for few tokens, and while gradients or graphs are recorded or hooks
        listen: they may be differentiated any way, compiled as one graph, and edited anywhere.
        """
        few = x.shape[:-1].numel() < MIN_TOKENS
        if few or is_recorded() or is_hooked(self.hook_sae_acts_pre, self.hook_sae_acts_post):
            return self.encode_densely(x)[0]
        active = self.find_active(self.normalized(x), "auto")
        return active.dense(self.read_acts(active)[0])

    def decode(self: Any, feature_acts: Tensor) -> Tensor:
        """Reconstructions, (..., d_in), from feature activations, (..., d_sae)."""
        decode = torch.matmul if is_recorded() else decode_matrix
        sae_out = self.hook_sae_recons(decode(feature_acts, self.W_dec) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)


def is_hooked(*points: nn.Module) -> bool:
    """Whether anything listens at one of these hook points."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return any(getattr(point, name) for point in points for name in hooks)


def is_recorded() -> bool:
    """Whether what is computed goes into a gradient's graph or a compiled one."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()
