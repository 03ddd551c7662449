"""What to do about latents that no longer fire: start them again, or give them the error to learn.

`resample`, as the Gated SAE paper does it, after Bricken et al. 2023 ("Towards Monosemanticity"):
each dead latent takes the direction of a token that is badly reconstructed, its encoder column that
of what the encoder makes of this token, at a fifth of the living ones' mean norm, its per-latent
parameters at 0 and its Adam moments at zero; the learning rate then drops to a tenth and comes back
by a cosine.

`auxk`, after Gao et al. 2024 ("Scaling and evaluating sparse autoencoders"): the dead latents with
the largest pre-activations reconstruct what the living ones leave over.

Which latents are dead is SAELens's to say: those that fired in none of the last
`dead_feature_window` steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from ..core.active import Active, tangent_gradient
from ..distributed.shards import LatentShards
from . import optimizer_hooks

ENCODER_SHARE = 0.2  # of the living encoder columns' mean norm; Bricken et al.
LR_SHARE = 0.1  # of the learning rate, right after resampling; Rajamanoharan et al.


def resample_if_due(sae: Any, step_input: TrainStepInput) -> None:
    """Resample at the configured steps, or when the dead share passes its limit; scale the lr.

    sae: a training SAE of ours, with a buffer `resampled_at`, () int64: the step, or -1.
    """
    cfg, step, dead = sae.cfg, step_input.n_training_steps, step_input.dead_neuron_mask
    last = int(sae.resampled_at)
    rested = last < 0 or step - last >= cfg.resample_warm_up_steps
    # A latent that has just started again fires on half of all tokens: it must have time to learn.
    end: float = getattr(sae, "total_training_steps", math.inf)
    n_dead = 0 if dead is None or step == last else int(sae.shards.total(dead.sum()))
    if dead is not None and n_dead:
        due = step in cfg.resample_steps or (
            cfg.resample_share is not None
            and rested
            and step <= end - 2 * cfg.resample_warm_up_steps
            and n_dead > cfg.resample_share * (sae.shards.d_sae or len(dead))
        )
        if due:
            _resample(sae, step_input.sae_in, dead)
            sae.resampled_at.fill_(step)
            last = step
    share = _lr_share(step - last, cfg.resample_warm_up_steps, resampled=last >= 0)
    optimizer_hooks.scale_learning_rate(sae, share)


def _lr_share(since: int, warm_up_steps: int, resampled: bool) -> float:
    """From LR_SHARE to 1 by half a cosine."""
    if not resampled or since >= warm_up_steps:
        return 1.0
    return LR_SHARE + (1 - LR_SHARE) * 0.5 * (1 - math.cos(math.pi * since / warm_up_steps))


@torch.no_grad()
def _resample(sae: Any, x: Tensor, dead: Tensor) -> None:
    """Rewrite dead latents from tokens of x (N, d_in), drawn by their squared error, squared.

    Bricken et al. draw from 819,200 tokens; here they are those of one batch. With more dead
    latents than tokens, several share a token's direction.
    """
    was_training = sae.training
    sae.eval()
    errors = (sae(x) - x).float().square().sum(-1)
    inputs = sae.process_sae_in(x)
    sae.train(was_training)
    weights = errors.square().nan_to_num(0.0, 0.0)  # of a bad batch, the good tokens
    latents = dead.nonzero().squeeze(1)
    possible = int((weights > 0).sum())
    if not possible:
        return
    # Every rank draws for all of them, by the same random numbers, and takes those of its own.
    counts = [int(count) for count in sae.shards.each(dead.sum()[None])]
    before, n_dead = sum(counts[: sae.shards.rank]), sum(counts)
    tokens = torch.multinomial(weights, n_dead, replacement=n_dead > possible)
    tokens = tokens[before : before + len(latents)]
    directions, encoder_directions = (
        torch.nn.functional.normalize(of[tokens].to(sae.W_dec.dtype), dim=-1)
        for of in (inputs, sae.encoder_input(inputs, None)[0])
    )
    # With free decoder norms a row keeps its length, with unit norm that is 1.
    lengths = _mean(sae.shards, sae.W_dec[~dead].norm(dim=1))
    encoder_norm = _mean(sae.shards, sae.W_enc[:, ~dead].norm(dim=0))
    rows, columns = directions * lengths, encoder_directions * (ENCODER_SHARE * encoder_norm)
    for name, axis in sae.latent_axes.items():
        if hasattr(sae, name):
            encoder = columns if axis == 1 else 0.0
            value = rows if name == "W_dec" else encoder
            optimizer_hooks.rewrite_latents(sae, name, latents, value)


def _mean(shards: LatentShards, numbers: Tensor) -> float | Tensor:
    """The mean of all ranks' numbers (n,), 1 of none."""
    counted = torch.stack([numbers.sum(), numbers.new_tensor(numbers.numel())])
    total, count = shards.total(counted)
    return total / count if count else 1.0


def auxk_loss(sae: Any, active: Active, residual: Tensor, dead: Tensor, tangent: bool) -> Tensor:
    """Squared error of the dead latents' reconstruction of `residual`, a 0-d tensor.

    active: the batch's; residual: (..., d_in), in the SAE's normalised space, without gradient;
    dead: (d_sae,) bool. Up to d_in / 2 latents per token; with fewer dead ones the loss counts for
    less, as in SAELens's topk. Thresholds learn as if a higher one lowered the code.
    """
    latents = dead.nonzero().squeeze(1)
    n_dead = int(sae.shards.total(dead.sum()))
    if not n_dead:
        return residual.new_zeros(())
    k_aux = max(1, residual.shape[-1] // 2)
    x = active.x.reshape(-1, residual.shape[-1])
    centred = x if active.b_dec is None else x - active.b_dec
    m = centred @ sae.W_enc.index_select(1, latents)
    chosen = m.topk(min(k_aux, len(latents)), dim=-1)
    threshold = sae.thresholds()[latents]
    straight_through = (threshold.detach() - threshold)[chosen.indices]
    wanted = chosen.values > 0
    if sae.shards.size > 1 and n_dead > k_aux:  # the largest of all ranks, not of each
        candidates = torch.cat(sae.shards.each(chosen.values), dim=-1)
        wanted = wanted & (chosen.values >= candidates.topk(k_aux, dim=-1).values[:, -1:])
    values = torch.where(wanted, chosen.values + straight_through, 0.0)
    codes = torch.zeros_like(m).scatter(-1, chosen.indices, values)
    rows = sae.W_dec.index_select(0, latents)
    recons = sae.shards.sum(codes @ (tangent_gradient(rows) if tangent else rows))
    error = recons - residual.reshape(x.shape)
    return min(1.0, n_dead / k_aux) * error.square().sum() / len(x)
