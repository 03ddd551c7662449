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
from torch import Tensor

from ..errors import ConfigError, PluginError, unknown_name
from ..plugins.hookspecs import hookimpl
from ..plugins.isolation import isolated


def way_out(dtype: torch.dtype) -> str:
    """What may help an SAE of this dtype whose numbers are not finite."""
    if dtype == torch.float16:
        return (
            "sae.dtype is float16, in which numbers end at 65504 and Adam's epsilon is 0; "
            "take float32 or bfloat16"
        )
    return "a lower lr or coefficient may help"


def bad_loss(losses: dict[str, Any], sae_in: Tensor, dtype: torch.dtype) -> str:
    """Say why a loss is not finite. losses: its terms; sae_in: (N, d_in); dtype: the SAE's."""
    bad_tokens = int((~torch.isfinite(sae_in)).any(dim=-1).sum())
    if bad_tokens:
        n_tokens = sae_in.shape[:-1].numel()
        return (
            f"the loss is not finite ({bad_tokens} of {n_tokens} tokens have NaN or infinite "
            "activations: float16 overflows, which bfloat16 and float32 do not, or the language "
            "model is damaged)."
        )
    terms = {name: torch.as_tensor(value).detach() for name, value in losses.items()}
    names = [name for name, value in terms.items() if not value.isfinite().all()]
    return (
        f"the loss is not finite ({', '.join(names) or 'the sum of its terms'} overflowed on "
        f"finite activations; {way_out(dtype)})."
    )


#: (acts, decoder_norms, n_tokens) -> 0-d tensor.
SparsityLoss = Callable[[Tensor, Tensor | None, int], Tensor]


def l1(acts: Tensor, decoder_norms: Tensor | None, n_tokens: int) -> Tensor:
    """Sum of activations over latents, mean over tokens.

    acts: any shape, >= 0, activation units. decoder_norms: not used; on a decoder with free norms
    this penalty can be escaped by shrinking activations and growing rows. n_tokens: N.
    Returns a 0-d tensor, at least fp32. Source: the sparsity term of
    Rajamanoharan et al. 2024.
    """
    return widened(acts).abs().sum() / n_tokens


def norm_weighted_l1(acts: Tensor, decoder_norms: Tensor | None, n_tokens: int) -> Tensor:
    """L1 of each latent's contribution to the reconstruction: its activation times its row's norm.

    acts: any shape, >= 0. decoder_norms: ‖W_dec row‖, broadcastable to acts, or None for all ones;
    it receives its gradient too. n_tokens: N. Returns a 0-d tensor, at least fp32.
    Source: SAELens's `standard` and `gated`.
    """
    acts = widened(acts).abs()
    return (acts if decoder_norms is None else acts * decoder_norms).sum() / n_tokens


def lp(acts: Tensor, decoder_norms: Tensor | None, n_tokens: int, *, p: float = 0.5) -> Tensor:
    """Sum of f^p over latents, mean over tokens; the smaller p, the closer to counting latents.

    There is no p-th root, unlike with `lp_norm` of SAELens's `standard`: tokens and latents add up
    independently, and at p = 1 the two agree. acts: any shape, >= 0. decoder_norms: not used.
    n_tokens: N. p: 0 < p <= 1; the default is the usual representative of that range (Xu et al.
    2012, "L1/2 regularization"). Returns a 0-d tensor, at least fp32.
    """
    acts = widened(acts)
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


def get_loss(name: str) -> SparsityLoss:
    """Return the sparsity loss of that name: a registered one, or `lp_<p>` for any 0 < p <= 1.

    Raises ConfigError for a name nobody registered, and for a p out of range.
    """
    from ..plugins.bridge import registry

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
    with isolated(f"Sparsity loss '{name}'"):
        value: Any = loss(acts, None, n_tokens)
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


def widened(acts: Tensor) -> Tensor:
    """The same numbers in fp32, or in their own dtype where that is wider."""
    return acts.to(torch.promote_types(acts.dtype, torch.float32))
