"""Encode and decode on the active latents only.

After the gate about 1 % of latents matter, in the reconstruction, in every loss term and in every
gradient. So a step is one dense product (the encoder's) and then work on the active entries alone:

    m = (x - b_dec) W_enc                              dense, never kept as a whole
    support = {(token, latent): m > threshold}         CSR
    x_hat[t] = sum of v[t, j] * W_dec[j] over support  `decode_active`

Both operations have a dense form with the same mathematics for the first steps of training, when
half of all latents fire, and for hooks that want to see whole activation matrices. Architectures
are written once, on `Active.values`, and hold for either form.

Shapes: N tokens, d_in, d_sae, nnz active entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import choice, cost
from .gradients import (
    centre,
    dense_encode,
    latent_rows,
    sparse_decode,
    sparse_decode_both,
    tangent_gradient,
    with_gradient,
)
from .support import Backend, Support, flat_nonzero, make_support, outside_graphs
from .support_tensor import Content, SupportTensor


@dataclass(frozen=True)
class Active:
    """The active entries of one batch, in sparse or dense form.

    values: m = (x - b_dec) W_enc on the support, (nnz,); in the dense form all of it, (..., d_sae).
    support: the CSR support over the N tokens of x, flattened; None in the dense form.
    mask: of `values`' shape, 1 where active and 0 elsewhere, for a product with it takes a fifth of
        the time of a `where`; None where all entries are active.
    x, b_dec: what it was computed from; x is (..., d_in).
    """

    values: Tensor
    support: Support | None
    mask: Tensor | None
    x: Tensor = field(repr=False)
    b_dec: Tensor | None = field(repr=False)

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return self.x.shape[:-1].numel()

    def per_latent(self, parameter: Tensor) -> Tensor:
        """A (d_sae,) parameter brought to the shape of `values` (differentiable)."""
        return parameter if self.support is None else self.support.per_latent(parameter)

    def keep(self, values: Tensor) -> Tensor:
        """`values` with everything outside the support set to exactly 0."""
        return values if self.mask is None else values * self.mask

    def project(self, weight: Tensor) -> Tensor:
        """Values of (x - b_dec) `weight` on this support, for a second (d_in, d_sae) encoder."""
        if self.support is None:
            return dense_encode(self.x, weight, self.b_dec)
        with torch.no_grad():
            centred = centre(self.x, self.b_dec, weight)
            (values,) = self.support.dot_products((centred,), latent_rows(weight))
        return with_gradient(self.x, weight, self.b_dec, values, self.support)

    def dense(self, values: Tensor) -> Tensor:
        """`values` as a (..., d_sae) matrix with zeros outside the support."""
        values = self.keep(values)
        if self.support is None:
            return values
        d_sae = self.support.d_sae
        out = values.new_zeros(self.n_tokens * d_sae)
        out = out.index_put((self.support.flat,), values)
        return out.view(*self.x.shape[:-1], d_sae)

    @outside_graphs
    def matrix(self, values: Tensor) -> Tensor:
        """`values`, without gradient, as SAELens's trainer wants them: (N, d_sae), in the sparse
        form a `SupportTensor`; in the dense form as they are.
        """
        values = values.detach()
        if self.support is None:
            return values
        return SupportTensor(Content(self.support, self.keep(values)))


@outside_graphs
def encode_active(
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    b_dec: Tensor | None = None,
    backend: Backend = "auto",
) -> Active:
    """Find where m = (x - b_dec) W_enc exceeds `threshold`, and m there.

    x: (..., d_in); W_enc: (d_in, d_sae), fastest when each latent's column is contiguous
    (`rows.T` of a (d_sae, d_in) tensor); threshold: (d_sae,), strict, without gradient
    (m + b > 0 is m > -b, exactly, in IEEE arithmetic); b_dec: (d_in,) or None.
    Gradients reach x, W_enc and b_dec through `values` only; b_dec's is W_enc times a vector.

    backend: "auto" takes the sparse form where `choice.find` expects it to be the faster one;
    "sparse" and "dense" always take theirs. The sparse form's numbers are those of W_enc's dtype
    (float32 or float64), also under autocast.
    """
    half = torch.is_autocast_enabled(x.device.type)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        threshold = threshold.detach()
        found = choice.find(centre(x, b_dec, W_enc), W_enc, threshold, backend, half)
    if found is None:
        m = dense_encode(x, W_enc, b_dec)
        return dense_form(m, threshold, x, b_dec)
    values = with_gradient(x, W_enc, b_dec, found.values, found.support)
    return Active(values, found.support, found.mask, x, b_dec)


def dense_form(m: Tensor, threshold: Tensor, x: Tensor, b_dec: Tensor | None = None) -> Active:
    """The dense form for an m = (x - b_dec) W_enc, (..., d_sae), that was computed elsewhere."""
    mask = (m.detach() > threshold.detach()).to(m.dtype)
    return Active(m, None, mask, x, b_dec)


@outside_graphs
def decode_active(active: Active, values: Tensor, W_dec: Tensor, tangent: bool = False) -> Tensor:
    """Sum of `values` times decoder rows over each token's active latents, (..., d_in).

    values: like `active.values`, zero outside the support; W_dec: (d_sae, d_in).
    The gradient with respect to W_dec is computed only where W_dec wants one. tangent: take from
    it what lies along each row, which must have norm 1 (Rajamanoharan et al. 2024, after Bricken
    et al. 2023).
    """
    if active.support is None:
        return values @ (tangent_gradient(W_dec) if tangent else W_dec)
    out = sparse_decode(values, W_dec, active.support, tangent)
    return out.view(*active.x.shape[:-1], W_dec.shape[1])


@outside_graphs
def decode_both(
    active: Active,
    values: Tensor,
    auxiliary: Tensor,
    W_dec: Tensor,
    tangent: bool = False,
    frozen: bool = True,
) -> Iterator[Tensor]:
    """`decode_active` of two codes, (..., d_in) each; a decoder row is read once for both. In the
    dense form the second is computed when it is asked for.

    frozen: the second one gives W_dec no gradient.
    """
    if active.support is None:
        W_aux = W_dec.detach() if frozen else W_dec
        codes = ((values, W_dec), (auxiliary, W_aux))
        return (decode_active(active, code, rows, tangent) for code, rows in codes)
    outs = sparse_decode_both(values, auxiliary, W_dec, active.support, tangent, frozen)
    return (out.view(*active.x.shape[:-1], W_dec.shape[1]) for out in outs)


@outside_graphs
def decode_matrix(acts: Tensor, W_dec: Tensor) -> Tensor:
    """acts @ W_dec without gradients: only the active latents where few are.

    acts: (..., d_sae), any values, also a sparse tensor; W_dec: (d_sae, d_in). Returns (..., d_in).
    """
    if acts.layout != torch.strided:
        return acts @ W_dec
    rows = acts.reshape(-1, acts.shape[-1])
    usable = rows.shape[0] >= cost.MIN_TOKENS and rows.dtype == W_dec.dtype in cost.SPARSE_DTYPES
    crossover = cost.CROSSOVER_DENSITY.get(acts.device.type, 0.0)
    if not usable or choice.share_of(rows[: cost.DENSITY_SAMPLE] != 0) >= crossover:
        return acts @ W_dec
    flat = flat_nonzero((rows != 0).contiguous())
    support = make_support(flat, rows.shape[0], rows.shape[1])
    (out,) = support.sums_by_token((rows.reshape(-1)[flat],), W_dec)
    return out.view(*acts.shape[:-1], W_dec.shape[1])
