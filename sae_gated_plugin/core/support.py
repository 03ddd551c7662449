"""The support: which latents are active on which tokens, and what can be summed over it.

`Support` computes with torch's own operations, on any device; `cuda.CudaSupport` does the same with
Triton's kernels. All else, gradients and architectures included, asks the support and does not
know which one it has.

Shapes: N tokens, d_in, d_sae, nnz entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from . import products

F = TypeVar("F", bound=Callable[..., Any])
#: Rows of this width, and as many of them, are worth being read once for two codes: a cache does
#: not hold them, and a row costs more than its index.
WIDE = 512

_COMPARED_BY_NUMPY = (torch.float32, torch.float64, torch.int16)
Backend = Literal["auto", "dense", "sparse"]


def outside_graphs(function: F) -> F:
    """The support has no static size: `torch.compile` breaks its graph here and then goes on."""
    return cast(F, torch.compiler.disable(function))


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
        return self.row.long() * self.d_sae + self.col

    @cached_property
    def indices(self) -> Tensor:
        """Tokens and latents of the entries for a COO tensor, (2, nnz) int64."""
        return torch.stack([self.row, self.col]).long()

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose: offsets (d_sae + 1,), entry order (nnz,), tokens in that order (nnz,)."""
        if self.col.device.type == "cpu":  # scipy counts where torch sorts: ten times as fast
            from scipy.sparse import csr_array

            entries = np.arange(self.col.numel())
            by_token = csr_array(
                (entries, self.col.numpy(), self.crow.numpy()), shape=(self.n_tokens, self.d_sae)
            )
            transposed = by_token.tocsc()
            parts = (transposed.indptr, transposed.data, transposed.indices)
            offsets, order, row = (torch.from_numpy(part).long() for part in parts)
            return offsets, order, row
        return self.sorted_by_latent()

    def sorted_by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """`by_latent` by a sort: no size depends on the data, so no GPU is waited for."""
        latents, order = self.col.sort(stable=True)
        edges = torch.arange(self.d_sae + 1, device=latents.device, dtype=latents.dtype)
        return torch.searchsorted(latents, edges), order, self.row[order]

    def slices(self, latents: Sequence[slice]) -> list[Part]:
        """The support cut by latents; the slices follow on each other and cover all.

        A part per slice, so that a product's result is as large as that of a whole token. Waits
        for a GPU, for the numbers of their entries.
        """
        number = self.col.new_zeros(self.col.shape, dtype=torch.int16)
        for part in latents[1:]:
            number += self.col >= part.start
        order = number.sort(stable=True).indices  # torch sorts short integers by their digits
        sizes = torch.bincount(number, minlength=len(latents)).tolist()
        return [
            Part(part, entries, self._of(entries, part))
            for part, entries in zip(latents, order.split(sizes))
        ]

    def _of(self, entries: Tensor, latents: slice) -> Support:
        """The support of some entries (n,), ascending, all of them of these latents."""
        row = self.row[entries]
        starts = torch.arange(self.n_tokens + 1, device=row.device, dtype=row.dtype)
        return Support(
            torch.searchsorted(row, starts),
            self.col[entries] - latents.start,
            latents.stop - latents.start,
        )

    def chosen(self, entries: Tensor) -> Support:
        """These entries alone, (n,) int64, ascending."""
        col = self.col.index_select(0, entries)
        return Support(torch.searchsorted(entries, self.crow), col, self.d_sae)

    def per_latent(self, parameter: Tensor) -> Tensor:
        """A (d_sae,) parameter at each entry, (nnz,), differentiable."""
        # index_select, not indexing: its gradient is an index_add.
        return parameter.index_select(0, self.col)

    def totals_by_latent(self, values: Tensor) -> Tensor:
        """out[j] = sum of values (nnz,) over the latent's entries, (d_sae,)."""
        return values.new_zeros(self.d_sae).index_add_(0, self.col, values)

    def sums_by_token(self, values: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
        """out[t] = sum of values * rows[latent] over the token's entries, for each of `values`.

        values: each (nnz,); rows: (d_sae, width). Returns as many (N, width).
        """
        n = len(values)
        if n == 1 or min(rows.shape) < WIDE:
            return [products.bags(self.col, rows, self.crow, value) for value in values]
        # A token's entries n times on end: its rows are read from memory once, then from the cache.
        codes, entries = (torch.arange(k, device=self.col.device) for k in (n, self.col.numel()))
        starts = self.crow[:-1, None] * n + self.crow.diff()[:, None] * codes
        places = (entries - self.crow[self.row])[:, None] + starts[self.row]
        index, weights = self.col.new_empty(places.numel()), values[0].new_empty(places.numel())
        index[places], weights[places] = self.col[:, None], torch.stack(values, 1)
        offsets = torch.cat([starts.view(-1), self.crow[-1:] * n])
        out = products.bags(index, rows, offsets, weights)
        return list(out.view(self.n_tokens, n, rows.shape[1]).unbind(1))

    def sum_by_latent(self, values: Tensor, rows: Tensor) -> Tensor:
        """out[j] = sum of values (nnz,) * rows[token] over the latent's entries; rows (N, width).

        Returns (d_sae, width).
        """
        offsets, order, tokens = self.by_latent
        return products.bags(tokens, rows, offsets, values[order])

    def tangent_sum_by_latent(
        self, values: Tensor, rows: Tensor, unit: Tensor, dots: Tensor
    ) -> Tensor:
        """`sum_by_latent` without its part along the latent's row of `unit`, (d_sae, width).

        dots: (nnz,), the products of unit rows and `rows` at the entries.
        """
        out = self.sum_by_latent(values, rows)
        # row . out is a sum over the entries: no pass over the two matrices.
        return out.addcmul_(unit, self.totals_by_latent(values * dots)[:, None], value=-1)

    def dot_products(self, lefts: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
        """out[e] = left[token] . rows[latent], (nnz,), for each of `lefts`.

        lefts: each (N, width); rows: (d_sae, width).
        """
        return [products.sampled(left, rows, self) for left in lefts]


class Part(NamedTuple):
    """Some latents of a support: which, their entries' positions in it, and they alone.

    support: of one or several slices; a token is then as many tokens, a slice each.
    """

    latents: slice
    entries: Tensor | slice
    support: Support


def make_support(flat: Tensor, n_tokens: int, d_sae: int) -> Support:
    """The support of ascending positions `flat` in an (n_tokens, d_sae) matrix."""
    starts = torch.arange(n_tokens + 1, device=flat.device) * d_sae
    return Support(torch.searchsorted(flat, starts), flat % d_sae, d_sae)


def greater(left: Tensor, right: Tensor | int) -> Tensor:
    """left > right, by numpy where it can: it takes a fifth of torch's time, on one core."""
    if left.device.type != "cpu" or left.dtype not in _COMPARED_BY_NUMPY:
        return left > right
    limit = right.numpy() if isinstance(right, Tensor) else right
    return torch.from_numpy(np.greater(left.numpy(), limit))


def flat_nonzero(mask: Tensor) -> Tensor:
    """Flat positions of True, ascending."""
    if mask.device.type == "cpu":  # numpy's takes a third of torch's time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)
