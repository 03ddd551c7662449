"""Matryoshka losses (Bussmann et al. 2025, arXiv 2503.17547) for thresholded codes.

With `matryoshka_widths` w_1 < ... < w_K = d_sae the loss is the sum of K, each of them the
architecture's own, of the first w_k latents: for gated

    sum over k of  |x - x_hat_k|^2 + lambda |g_k|_1 + |x - x_hat_k, frozen(g_k)|^2

where x_hat_k and g_k have latents below w_k alone, and b_dec is in all. As in SAELens's
matryoshka_batchtopk prefixes are summed, not averaged, all with weight 1, and auxk's loss is that
of the whole code.

The penalty is in every prefix, too. A latent that is in c prefixes has c reconstructions pull at it
and pays c times, so lambda / 2 stays what it is without prefixes: how far the mean residual must
lie along a decoder row before the latent becomes active, the same for all latents, as a batchtopk
has one threshold for all. Were it paid once, the first latents would be c times as cheap. The
controller of `target_l0` then moves that one threshold until the whole code has the wanted L0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.prefixes import Prefixes

#: SAELens's normalisations whose statistics are each token's own.
PER_TOKEN = ("layer_norm", "constant_norm_rescale")


def decode(
    sae: Any, prefixes: Prefixes, codes: Sequence[Tensor], x: Tensor, auxiliary: str
) -> Callable[[], tuple[Tensor, Tensor | None, dict[str, Tensor]]]:
    """Reconstruction and auxiliary reconstruction, (N, d_in), as the SAE normalises them, and the
    inner prefixes' squared errors by SAELens's names for them; over several ranks they are on their
    way, and what is returned waits for them.

    codes: f, and the auxiliary code where there is one, whose loss is called `auxiliary`;
    x: (N, d_in), as it came in.
    """
    target, scale = x, None
    if sae.cfg.normalize_activations in PER_TOKEN:
        target, scale = _normalized_target(sae, x)
    unit_norm, frozen = sae.cfg.decoder == "unit_norm", sae.aux_decoder_frozen
    begin_sum = sae.shards.begin_sum if sae.shards.size > 1 else None
    outs = prefixes.decode(codes, sae.W_dec, sae.b_dec, target, scale, unit_norm, frozen, begin_sum)

    def arrived() -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        recons: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        for name, (out, errors) in zip(("mse_loss", auxiliary), outs):
            recons.append(out)
            for width, error in zip(sae.cfg.matryoshka_widths, errors):
                losses[f"inner_{name}_{width}"] = error
        return recons[0], recons[1] if len(recons) > 1 else None, losses

    return arrived


def prefix_penalty(slices: Sequence[Tensor]) -> Tensor:
    """Sum of the prefixes' penalties, from those of the slices between two widths.

    A sparsity loss is a sum over latents, so a prefix's is the sum of its slices', and the first
    slice is in every prefix.
    """
    return torch.stack([(len(slices) - i) * value for i, value in enumerate(slices)]).sum()


def _normalized_target(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a reconstruction before SAELens's per-token normalisation is undone is compared with,
    (N, d_in), and the factor of each token's errors, (N, 1).

    Errors are those of the un-normalised reconstruction. x: (N, d_in), which the SAE has just
    normalised.
    """

    def undone(of: Tensor) -> Tensor:
        out = sae.run_time_activation_norm_fn_out(of)
        sae.run_time_activation_norm_fn_in(x)  # SAELens forgets the statistics it has used
        return out

    x = x.detach().to(sae.dtype)
    shift = undone(torch.zeros_like(x))
    scale = (undone(torch.ones_like(x)) - shift)[:, :1]
    return (x - shift) / scale, scale
