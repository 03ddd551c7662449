"""The core: encode and decode on the active latents only.

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

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels

F = TypeVar("F", bound=Callable[..., Any])
Backend = Literal["auto", "dense", "sparse"]


def _outside_graphs(function: F) -> F:
    """The support has no static size: `torch.compile` breaks its graph here and then goes on."""
    return cast(F, torch.compiler.disable(function))


#: Share of active latents below which the sparse form is the faster one; see
#: `benchmarks/crossover.py` and the table in benchmarks/RESULTS.md. A constant rather than a
#: timing at start-up, so that the same seed gives the same bits on every run and after a resume.
#: The figure for CUDA is a guess: it has not been measured.
CROSSOVER_DENSITY = {"cpu": 0.12, "cuda": 0.03}

#: Share of active latents above which screening costs more than it saves: the exact values of the
#: candidates cost about 1e-4 ms each, the float32 product that they replace as much as 3 % of them.
SCREEN_DENSITY = 0.03

#: Tokens whose pre-activations decide between the two forms; 64 x d_sae entries are plenty.
DENSITY_SAMPLE = 64

#: Fewer tokens than this are not worth the choice.
MIN_TOKENS = 4 * DENSITY_SAMPLE

#: What torch's sparse products compute in.
SPARSE_DTYPES = (torch.float32, torch.float64)

#: Share of a block's entries that may be candidates before screening gives up.
MAX_CANDIDATES = 0.25

#: Tokens per block of the encoder product, so that a block of `m` stays in cache.
BLOCK = 512


@dataclass(frozen=True)
class Support:
    """Which latents are active for which token, in compressed sparse row form.

    crow: (N + 1,) int64 offsets; col: (nnz,) int64 latents, ascending within a token.
    """

    crow: Tensor
    col: Tensor
    d_sae: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return self.crow.numel() - 1

    @cached_property
    def row(self) -> Tensor:
        """Token of each entry, (nnz,) int64."""
        return torch.repeat_interleave(
            torch.arange(self.n_tokens, device=self.col.device),
            self.crow.diff(),
            output_size=self.col.numel(),
        )

    @property
    def flat(self) -> Tensor:
        """Position of each entry in an (N, d_sae) matrix, (nnz,) int64."""
        return self.row * self.d_sae + self.col

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose: offsets (d_sae + 1,), entry order (nnz,), tokens in that order (nnz,)."""
        if self.col.device.type == "cpu":  # scipy counts where torch sorts: ten times as fast
            entries = np.arange(self.col.numel())
            by_token = csr_array(
                (entries, self.col.numpy(), self.crow.numpy()), shape=(self.n_tokens, self.d_sae)
            )
            transposed = by_token.tocsc()
            parts = (transposed.indptr, transposed.data, transposed.indices)
            offsets, order, row = (torch.from_numpy(part).long() for part in parts)
            return offsets, order, row
        order = torch.argsort(self.col, stable=True)
        offsets = self.col.new_zeros(self.d_sae + 1)
        torch.cumsum(torch.bincount(self.col, minlength=self.d_sae), 0, out=offsets[1:])
        return offsets, order, self.row[order]


@dataclass(frozen=True)
class Active:
    """The active entries of one batch, in sparse or dense form.

    values: m = (x - b_dec) W_enc on the support, (nnz,); in the dense form all of it, (..., d_sae).
    support: the CSR support over the N tokens of x, flattened; None in the dense form.
    mask: (..., d_sae) in the dense form, 1 where active and 0 elsewhere, for a product with it
        takes a fifth of the time of a `where`; None in the sparse form.
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
        # index_select, not indexing: its gradient is an index_add.
        return parameter if self.support is None else parameter.index_select(0, self.support.col)

    def keep(self, values: Tensor) -> Tensor:
        """`values` with everything outside the support set to exactly 0."""
        return values if self.mask is None else values * self.mask

    def project(self, weight: Tensor) -> Tensor:
        """Values of (x - b_dec) `weight` on this support, for a second (d_in, d_sae) encoder."""
        if self.support is None:
            return cast(Tensor, _DenseEncode.apply(self.x, weight, self.b_dec))
        with torch.no_grad():
            values = _sampled(_centre(self.x, self.b_dec, weight), weight, self.support)
        return _with_gradient(self.x, weight, self.b_dec, values, self.support)

    def dense(self, values: Tensor) -> Tensor:
        """`values` as a (..., d_sae) matrix with zeros outside the support."""
        if self.support is None:
            return self.keep(values)
        d_sae = self.support.d_sae
        out = values.new_zeros(self.n_tokens * d_sae)
        out = out.index_put((self.support.flat,), values)
        return out.view(*self.x.shape[:-1], d_sae)

    @_outside_graphs
    def coo(self, values: Tensor) -> Tensor:
        """`values` for SAELens's trainer: sparse COO (N, d_sae); in dense form as they are."""
        if self.support is None:
            return values
        return torch.sparse_coo_tensor(
            torch.stack([self.support.row, self.support.col]),
            values,
            (self.n_tokens, self.support.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )


@_outside_graphs
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

    backend: "auto" takes the sparse form when the measured density is below the crossover, and
    there lets a bfloat16 product rule out most entries where that is fast; "sparse" never does.
    The sparse form's numbers are those of W_enc's dtype (float32 or float64), also under autocast.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        threshold = threshold.detach()
        centred = _centre(x, b_dec, W_enc)
        screen = False
        if backend == "auto":
            density = _density(centred, W_enc, threshold)
            backend = "sparse" if density < CROSSOVER_DENSITY.get(x.device.type, 0.0) else "dense"
            screen = density < SCREEN_DENSITY and _fast_bfloat16(x.device.type)
        found = _find(centred, W_enc, threshold, screen) if backend == "sparse" else None
    if found is None:
        m = cast(Tensor, _DenseEncode.apply(x, W_enc, b_dec))
        return dense_form(m, threshold, x, b_dec)
    support, values = found
    return Active(_with_gradient(x, W_enc, b_dec, values, support), support, None, x, b_dec)


def dense_form(m: Tensor, threshold: Tensor, x: Tensor, b_dec: Tensor | None = None) -> Active:
    """The dense form for an m = (x - b_dec) W_enc, (..., d_sae), that was computed elsewhere."""
    mask = (m.detach() > threshold.detach()).to(m.dtype)
    return Active(m, None, mask, x, b_dec)


@_outside_graphs
def decode_active(active: Active, values: Tensor, W_dec: Tensor, tangent: bool = False) -> Tensor:
    """Sum of `values` times decoder rows over each token's active latents, (..., d_in).

    values: like `active.values`, zero outside the support; W_dec: (d_sae, d_in).
    The gradient with respect to W_dec is computed only where W_dec wants one. tangent: take from
    it what lies along each row, which must have norm 1 (Rajamanoharan et al. 2024, after Bricken
    et al. 2023).
    """
    if active.support is None:
        return values @ (tangent_gradient(W_dec) if tangent else W_dec)
    out = cast(Tensor, _SparseDecode.apply(values, W_dec, active.support, tangent))
    return out.view(*active.x.shape[:-1], W_dec.shape[1])


def tangent_gradient(W_dec: Tensor) -> Tensor:
    """W_dec (d_sae, d_in), unit rows, whose gradient will have no component along them."""
    return cast(Tensor, _TangentGradient.apply(W_dec))


@_outside_graphs
def decode_matrix(acts: Tensor, W_dec: Tensor) -> Tensor:
    """acts @ W_dec without gradients: only the active latents where few are.

    acts: (..., d_sae), any values, also a sparse tensor; W_dec: (d_sae, d_in). Returns (..., d_in).
    """
    if acts.layout != torch.strided:
        return acts @ W_dec
    rows = acts.reshape(-1, acts.shape[-1])
    usable = rows.shape[0] >= MIN_TOKENS and rows.dtype == W_dec.dtype in SPARSE_DTYPES
    crossover = CROSSOVER_DENSITY.get(acts.device.type, 0.0)
    if not usable or _share(rows[:DENSITY_SAMPLE] != 0) >= crossover:
        return acts @ W_dec
    flat = _flat_nonzero((rows != 0).contiguous())
    support = _support(flat, rows.shape[0], rows.shape[1])
    out = _gather_sum(support, rows.reshape(-1)[flat], W_dec)
    return out.view(*acts.shape[:-1], W_dec.shape[1])


# --- autograd -------------------------------------------------------------------------------------


class _DenseEncode(torch.autograd.Function):
    """(x - b_dec) W_enc whose b_dec gradient is a matrix-vector product, not an N x d_in matmul.

    Written in differentiable operations, so second derivatives work as for a plain matmul.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else W_enc.dtype
        with torch.autocast(device, enabled=False):
            m = _centre(x, b_dec, W_enc).to(ctx.dtype) @ W_enc.to(ctx.dtype)
            return m.view(*x.shape[:-1], W_enc.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        grad = grads[0].reshape(-1, W_enc.shape[1])
        grad_x = grad_W = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = (grad.to(ctx.dtype) @ W_enc.to(ctx.dtype).T).to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                centred = _centre(x, b_dec, W_enc).to(ctx.dtype)
                # (d_sae, d_in) and its view: the layout of a column-contiguous W_enc.
                grad_W = (grad.to(ctx.dtype).T @ centred).to(W_enc.dtype).T
            if ctx.needs_input_grad[2]:
                grad_b = -(W_enc @ grad.sum(0, dtype=W_enc.dtype)).to(b_dec.dtype)
        return grad_x, grad_W, grad_b


class _SparseEncode(torch.autograd.Function):
    """Attach gradients to values of (x - b_dec) W_enc that were already found on a support."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_dec: Tensor | None,
        values: Tensor,
        support: Support,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.support = support
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        support: Support = ctx.support
        (grad,) = grads
        grad_x = grad_W = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = _gather_sum(support, grad, _rows(W_enc)).to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                # (d_sae, d_in) and its view: the layout of a column-contiguous W_enc.
                grad_W = _gather_sum_by_latent(support, grad, _centre(x, b_dec, W_enc)).T
            if ctx.needs_input_grad[2]:
                total = grad.new_zeros(support.d_sae).index_add_(0, support.col, grad)
                grad_b = -(W_enc @ total)
        return grad_x, grad_W, grad_b, None, None


def _with_gradient(
    x: Tensor, W_enc: Tensor, b_dec: Tensor | None, values: Tensor, support: Support
) -> Tensor:
    return cast(Tensor, _SparseEncode.apply(x, W_enc, b_dec, values, support))


class _SparseDecode(torch.autograd.Function):
    """Sparse times dense, with a sampled product and a transposed sparse product behind it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support, tangent: bool) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.support, ctx.tangent = support, tangent
        with torch.autocast(values.device.type, enabled=False):
            return _gather_sum(support, values.to(W_dec.dtype), W_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad = grads[0].to(W_dec.dtype).contiguous()
        grad_values = grad_W = None
        with torch.autocast(grad.device.type, enabled=False):
            wide = values.to(W_dec.dtype)
            if ctx.needs_input_grad[0] or ctx.tangent:
                grad_values = _sampled(grad, W_dec.T, support)
            if ctx.needs_input_grad[1]:
                grad_W = _gather_sum_by_latent(support, wide, grad)
                if ctx.tangent and grad_values is not None:
                    # row . grad_W summed over the entries: no pass over the two matrices.
                    along = grad.new_zeros(support.d_sae)
                    along.index_add_(0, support.col, wide * grad_values)
                    grad_W.addcmul_(W_dec, along[:, None], value=-1)
            if grad_values is not None:
                grad_values = grad_values.to(values.dtype)
        return grad_values, grad_W, None, None


class _TangentGradient(torch.autograd.Function):
    """Identity whose gradient has no component along the (unit) rows."""

    @staticmethod
    def forward(ctx: Any, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(W_dec)
        return W_dec.view_as(W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (W_dec,) = ctx.saved_tensors
        along = torch.linalg.vecdot(grads[0], W_dec)
        return torch.addcmul(grads[0], W_dec, along[:, None], value=-1)


def _centre(x: Tensor, b_dec: Tensor | None, like: Tensor) -> Tensor:
    """x - b_dec in the dtype of `like`, (N, d_in)."""
    x = x.reshape(-1, x.shape[-1]).to(like.dtype)
    return x if b_dec is None else x - b_dec


def _rows(weight: Tensor) -> Tensor:
    """(d_in, d_sae) as contiguous (d_sae, d_in) rows; free for a column-contiguous weight."""
    return weight.T.contiguous()


# --- three sparse products ------------------------------------------------------------------------


def _gather_sum(support: Support, values: Tensor, rows: Tensor) -> Tensor:
    """out[t] = sum of values * rows[latent] over the token's entries; rows (d_sae, d_in)."""
    return _bags(support.col, rows, support.crow, values)


def _gather_sum_by_latent(support: Support, values: Tensor, rows: Tensor) -> Tensor:
    """out[j] = sum of values * rows[token] over the latent's entries; rows (N, d_in)."""
    offsets, order, tokens = support.by_latent
    return _bags(tokens, rows, offsets, values[order])


def _bags(index: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    if index.numel() == 0:
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    rows = rows.contiguous()

    def with_torch() -> Tensor:
        # The fastest of torch's sparse products here, and the only one that neither needs MKL nor
        # warns about beta CSR tensors.
        return torch.nn.functional.embedding_bag(
            index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def with_triton() -> Tensor:
        from .kernels.triton_kernels import gather_sum

        return gather_sum(index, rows, offsets, weights)

    return _run("gather_sum", rows, with_torch, with_triton)


def _sampled(left: Tensor, right: Tensor, support: Support) -> Tensor:
    """(left @ right) on the support, (nnz,); left (N, d), right (d, d_sae)."""
    left, rows = left.contiguous(), _rows(right)
    if support.col.numel() == 0:
        return left.new_empty(0)

    def with_torch() -> Tensor:
        if not _has_sampled_addmm(left.device.type):
            return _sampled_by_gather(left, rows, support)
        pattern = torch.sparse_csr_tensor(
            support.crow,
            support.col,
            left.new_zeros(support.col.numel()),
            (support.n_tokens, support.d_sae),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, left, rows.T, beta=0.0).values()

    def with_triton() -> Tensor:
        from .kernels.triton_kernels import sampled

        return sampled(left, rows, support.row, support.col)

    return _run("sampled", left, with_torch, with_triton)


def _run(
    operation: str,
    like: Tensor,
    with_torch: Callable[[], Tensor],
    with_triton: Callable[[], Tensor],
) -> Tensor:
    """torch's version on the CPU; on a GPU the faster one of the two, found out once."""
    if not like.is_cuda or not kernels.has_triton():
        return with_torch()
    key = (operation, str(like.device), str(like.dtype), like.shape[1])
    return kernels.fastest(key, {"torch": with_torch, "triton": with_triton})


def _sampled_by_gather(left: Tensor, rows: Tensor, support: Support) -> Tensor:
    """`_sampled` without CSR tensors, for builds of torch that refuse them; slower."""
    out = left.new_empty(support.col.numel())
    for start in range(0, out.numel(), 8192):
        part = slice(start, start + 8192)
        out[part] = (left[support.row[part]] * rows[support.col[part]]).sum(1)
    return out


@cache
def _has_sampled_addmm(device: str) -> bool:
    """Whether this build of torch has the sampled product; asked once, quietly."""
    with warnings.catch_warnings():
        # "Sparse CSR tensor support is in beta" is emitted once, here, and not shown.
        warnings.simplefilter("ignore")
        try:
            one = torch.ones(1, 1, device=device)
            torch.sparse.sampled_addmm(one.to_sparse_csr(), one, one, beta=0.0)
        except RuntimeError:
            return False
    return True


# --- finding the support --------------------------------------------------------------------------


def _density(centred: Tensor, W_enc: Tensor, threshold: Tensor) -> float:
    """Share of active latents among the first tokens; 1 where the sparse form cannot be taken.

    NaN exceeds no threshold: the sparse form would give such a token no latents instead of NaN.
    """
    if centred.shape[0] < MIN_TOKENS or W_enc.dtype not in SPARSE_DTYPES:
        return 1.0
    if not centred.sum().isfinite():
        return 1.0
    return _share(centred[:DENSITY_SAMPLE] @ W_enc > threshold)


def _share(mask: Tensor) -> float:
    return mask.count_nonzero().item() / max(1, mask.numel())


def _find(
    centred: Tensor, W_enc: Tensor, threshold: Tensor, screen: bool = False
) -> tuple[Support, Tensor]:
    """The support of centred @ W_enc > threshold and the product's values there."""
    if screen and W_enc.dtype == torch.float32:
        candidates = _screen(centred, W_enc, threshold)
        if candidates is not None:
            exact = _sampled(centred, W_enc, candidates)
            kept = exact > threshold[candidates.col]
            flat = candidates.flat[kept]
            return _support(flat, centred.shape[0], W_enc.shape[1]), exact[kept]
    flats: list[Tensor] = []
    values: list[Tensor] = []
    for flat, block, start in _blocks(centred, W_enc, threshold, torch.gt):
        flats.append(flat + start)
        values.append(block.view(-1)[flat])
    return _support(torch.cat(flats), centred.shape[0], W_enc.shape[1]), torch.cat(values)


def _blocks(
    left: Tensor, right: Tensor, limit: Tensor, compare: Callable[..., Tensor]
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For blocks of rows: where compare(left @ right, limit) holds, the product, the offset."""
    n_rows, d_sae = left.shape[0], right.shape[1]
    size = min(BLOCK, n_rows)
    product = left.new_empty(size, d_sae)
    mask = torch.empty(size, d_sae, dtype=torch.bool, device=left.device)
    for start in range(0, max(n_rows, 1), BLOCK):
        rows = min(BLOCK, n_rows - start)
        torch.mm(left[start : start + rows], right, out=product[:rows])
        compare(product[:rows], limit, out=mask[:rows])
        yield _flat_nonzero(mask[:rows]), product, start * d_sae


def _screen(centred: Tensor, W_enc: Tensor, threshold: Tensor) -> Support | None:
    """Every entry whose float32 product can exceed the threshold, and few others, by bfloat16.

    With x = x' + dx, w = w' + dw (primes: rounded to bfloat16) the product of the rounded factors
    is off by at most |dx| |w'| + |x| |dw|, and |dw| <= 2^-8 |w|. Summing K terms, in whatever order
    and in float32 with truncation, adds K 2^-22 |x| |w|; so much again is left for the float32
    product that decides. All of it is |w| times a number per token, so it enters the matmul as one
    more column, rounded up. Rounding the result to bfloat16 is monotone: comparing with the
    threshold rounded down loses nothing. What the hardware flushes to zero is below the last term.

    None where the bound is of no use: norms near overflow, NaN, or too many candidates.
    """
    n_tokens, d_in = centred.shape
    width = (d_in + 1 + 31) // 32 * 32  # matrix units like multiples of 32
    x_low = centred.new_zeros(n_tokens, width, dtype=torch.bfloat16)
    w_low = centred.new_zeros(W_enc.shape[1], width, dtype=torch.bfloat16)
    x_low[:, :d_in] = centred
    w_low[:, :d_in] = W_enc.T
    lost = d_in**0.5 * 2.0**-62  # what a norm misses of numbers whose squares underflow
    x_norm = torch.linalg.vector_norm(centred, dim=1) + lost
    w_norm = torch.linalg.vector_norm(W_enc, dim=0) + lost
    dx_norm = torch.linalg.vector_norm(centred - x_low[:, :d_in], dim=1) + lost

    u, summing = 2.0**-8, 2 * width * 2.0**-22
    margin = (1 + u) * dx_norm + (u + summing) * x_norm
    x_low[:, d_in] = margin * (1 + 4 * u)  # rounds up, with room for the norms' own rounding
    w_low[:, d_in] = w_norm * (1 + 4 * u)

    x_max, w_max = x_norm.max().item(), w_norm.max().item()
    if not x_max * w_max < 1e36:
        return None
    lowered = threshold - 2.0**-126 * width * (4 + x_max + w_max)
    limit = lowered.bfloat16()
    limit = torch.where(limit > lowered, limit.nextafter(limit.new_tensor(-torch.inf)), limit)

    flats: list[Tensor] = []
    for flat, _, start in _blocks(x_low, w_low.T, limit, torch.ge):
        if flat.numel() > MAX_CANDIDATES * BLOCK * W_enc.shape[1]:
            return None
        flats.append(flat + start)
    return _support(torch.cat(flats), n_tokens, W_enc.shape[1])


@cache
def _fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are much faster than float32's on this device."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def _support(flat: Tensor, n_tokens: int, d_sae: int) -> Support:
    starts = torch.arange(n_tokens + 1, device=flat.device) * d_sae
    return Support(torch.searchsorted(flat, starts), flat % d_sae, d_sae)


def _flat_nonzero(mask: Tensor) -> Tensor:
    """Flat positions of True, ascending. Looks at eight entries at a time: most words are zero."""
    flat = mask.view(-1)
    if flat.numel() % 8:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64).nonzero().squeeze(1)
    within = flat.view(-1, 8)[words].nonzero()
    return words[within[:, 0]] * 8 + within[:, 1]
