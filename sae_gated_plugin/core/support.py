"""The support: which latents are active on which tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
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


def make_support(flat: Tensor, n_tokens: int, d_sae: int) -> Support:
    """The support from flat indices of active entries, ascending."""
    starts = torch.arange(n_tokens + 1, device=flat.device) * d_sae
    return Support(torch.searchsorted(flat, starts), flat % d_sae, d_sae)


def flat_nonzero(mask: Tensor) -> Tensor:
    """Flat positions of True, ascending. Looks at eight entries at a time: most words are zero."""
    flat = mask.view(-1)
    if flat.numel() % 8:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64).nonzero().squeeze(1)
    within = flat.view(-1, 8)[words].nonzero()
    return words[within[:, 0]] * 8 + within[:, 1]
