"""Sparsity losses: pure functions of activations, in SAELens's units.

Each is a sum over latents and a mean over tokens, so λ means the same whatever the batch size:

    l1                  Σ f                     the Gated SAE paper's, arXiv 2404.16014
    norm_weighted_l1    Σ f ‖W_dec row‖         the same where decoder rows have free norms
    sqrt_l1             Σ √f                    Taggart 2024
    lp, lp_0.7, ...     Σ f^p                   p in the name; 1/2 where none is given

`acts` may have any shape, for the sum does not care: an (N, d_sae) matrix and the (nnz,) values of
its active entries give the same number and the same gradients. An activation of exactly zero adds
zero and receives a gradient of exactly zero. fp16 and bf16 are summed in fp32.

Beside them `decoder_coherence`, a penalty of the decoder alone, of which a config gives the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sae_lens.training._interruption import InterruptedException
from torch import Tensor

from .errors import ConfigError, PluginError, unknown_name
from .hook_points import first_line
from .hookspecs import hookimpl

#: (acts, decoder_norms, n_tokens) -> 0-d tensor.
SparsityLoss = Callable[[Tensor, Tensor | None, int], Tensor]


def l1(acts: Tensor, decoder_norms: Tensor | None, n_tokens: int) -> Tensor:
    """Sum of activations over latents, mean over tokens.

    acts: any shape, >= 0, activation units. decoder_norms: not used; on a decoder with free norms
    this penalty can be escaped by shrinking activations and growing rows. n_tokens: N.
    Returns a 0-d tensor, at least fp32. Source: the sparsity term of
    Rajamanoharan et al. 2024.
    """
    return _widened(acts).abs().sum() / n_tokens


def norm_weighted_l1(acts: Tensor, decoder_norms: Tensor | None, n_tokens: int) -> Tensor:
    """L1 of each latent's contribution to the reconstruction: its activation times its row's norm.

    acts: any shape, >= 0. decoder_norms: ‖W_dec row‖, broadcastable to acts, or None for all ones;
    it receives its gradient too. n_tokens: N. Returns a 0-d tensor, at least fp32.
    Source: SAELens's `standard` and `gated`.
    """
    acts = _widened(acts).abs()
    return (acts if decoder_norms is None else acts * decoder_norms).sum() / n_tokens


def lp(acts: Tensor, decoder_norms: Tensor | None, n_tokens: int, *, p: float = 0.5) -> Tensor:
    """Sum of f^p over latents, mean over tokens; the smaller p, the closer to counting latents.

    There is no p-th root, unlike with `lp_norm` of SAELens's `standard`: tokens and latents add up
    independently, and at p = 1 the two agree. acts: any shape, >= 0. decoder_norms: not used.
    n_tokens: N. p: 0 < p <= 1; the default is the usual representative of that range (Xu et al.
    2012, "L1/2 regularization"). Returns a 0-d tensor, at least fp32.
    """
    acts = _widened(acts)
    fires = acts > 0
    # The inner `where` keeps f = 0 away from the power, whose slope there is infinite: masking the
    # result alone would leave 0 * inf = NaN in the gradient.
    return torch.where(fires, torch.where(fires, acts, 1.0) ** p, 0.0).sum() / n_tokens


def sqrt_l1(acts: Tensor, decoder_norms: Tensor | None, n_tokens: int) -> Tensor:
    """Sum of square roots of activations over latents, mean over tokens.

    acts: any shape, >= 0. decoder_norms: not used. n_tokens: N. Returns a 0-d tensor, at least
    fp32. Source: the √L1 baseline of Taggart 2024 ("ProLU").
    """
    return lp(acts, decoder_norms, n_tokens, p=0.5)


#: Rows of the decoder that one estimate of `decoder_coherence` compares with all others: as many
#: tokens would be 6 % of the encoder's product at batch 4096.
COHERENCE_ROWS = 256


def decoder_coherence(
    W_dec: Tensor, cap: float, seed: int = 0, n_rows: int = COHERENCE_ROWS
) -> Tensor:
    """Sum over the other rows of max(0, |cosine similarity| - cap)², mean over rows.

    W_dec: (d_sae, d_in), rows of any norm; gradients are orthogonal to them. cap: in [0, 1). With
    more than n_rows rows an unbiased estimate, from n_rows of them against all: memory and work
    grow with n_rows d_sae. seed: of the choice; the global random numbers are left alone, for in a
    sweep they are everybody's. Returns a 0-d tensor, dimensionless.

    Source: readers' proposal to cap the cosine similarity, after the restricted isometry property
    of Candès & Tao 2005, which knows no sign. It is what `metrics.coherence` measures.
    """
    with torch.no_grad():
        chosen = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[:n_rows].to(W_dec.device)
        lengths = W_dec.norm(dim=1)
        products = (W_dec[chosen] @ W_dec.T).abs()
        near = (products > cap * lengths[chosen, None] * lengths).any(dim=0)
        near[chosen] = False
    # Most rows are near none of the chosen: gradients and their memory are for those that are.
    rows = W_dec.index_select(0, torch.cat([chosen, near.nonzero().squeeze(1)]))
    rows = torch.nn.functional.normalize(_widened(rows), dim=1)
    excess = ((rows[: len(chosen)] @ rows.T).abs() - cap).relu()
    itself = torch.eye(*excess.shape, dtype=torch.bool, device=excess.device)
    return excess.masked_fill(itself, 0.0).square().sum() / len(chosen)


def get_loss(name: str) -> SparsityLoss:
    """Return the sparsity loss of that name: a registered one, or `lp_<p>` for any 0 < p <= 1.

    Raises ConfigError for a name nobody registered, and for a p out of range.
    """
    from .plugins import registry

    known = registry().losses
    if name in known:
        return known[name]
    family, _, exponent = name.partition("_")
    try:
        p = float(exponent) if family == "lp" else None
    except ValueError:
        p = None
    if p is None:
        raise ConfigError(unknown_name("sparsity loss", name, known))
    if not 0 < p <= 1:
        raise ConfigError(f"Sparsity loss '{name}': p must lie in (0, 1], as in 'lp_0.5'.")
    return partial(lp, p=p)


def penalty(name: str, loss: SparsityLoss, acts: Tensor, n_tokens: int) -> Tensor:
    """Return a loss of acts, the name being what the configuration calls it.

    Raises PluginError where a plugin's function fails, or gives what cannot be a loss: anything but
    one number in a 0-d tensor, with a gradient where acts have one.
    """
    try:
        value: Any = loss(acts, None, n_tokens)
    except InterruptedException:  # of SAELens: somebody wants the training to stop
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"Sparsity loss '{name}' failed: {first_line(error)}") from error
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise PluginError(
            f"Sparsity loss '{name}' gave a {type(value).__name__}{shape}; it must give a 0-d "
            "tensor of a floating-point type."
        )
    if acts.requires_grad and not value.requires_grad:
        raise PluginError(f"Sparsity loss '{name}' has no gradient: it would penalise nothing.")
    return value


@hookimpl
def register_losses(register: Callable[[str, SparsityLoss], None]) -> None:
    """Register the built-in sparsity losses."""
    register("l1", l1)
    register("sqrt_l1", sqrt_l1)
    register("lp", lp)
    register("norm_weighted_l1", norm_weighted_l1)


def _widened(acts: Tensor) -> Tensor:
    """The same numbers in fp32, or in their own dtype where that is wider."""
    return acts.to(torch.promote_types(acts.dtype, torch.float32))
