"""Sparse codes of many tokens, compact."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class SparseCodes:
    """Codes of N tokens with at most k latents each, and a certificate per token.

    indices: (N, k) int64 latents; values: (N, k), >= 0; places not in use hold the value 0.
    iterations: (N,) int64. squared_residual: (N,) ‖r‖², fp64.
    violation: (N,) fp64, the largest breach of the optimality conditions, as a share of ‖x‖‖d‖:
        |r·d - λ| for a latent in use, r·d - λ above 0 for another one of the support (for `fista`:
        of all latents; for the rest λ is 0). Rounding to float32 leaves about 1e-7.
    duality_gap: (N,) fp64, `fista`'s objective is at most that much above its minimum.
    """

    indices: Tensor
    values: Tensor
    d_sae: int
    iterations: Tensor
    squared_residual: Tensor
    violation: Tensor
    duality_gap: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the codes as a matrix, (N, d_sae)."""
        matrix = self.values.new_zeros(len(self.values), self.d_sae)
        return matrix.scatter_add_(1, self.indices, self.values)

    def sparse(self) -> Tensor:
        """Return the codes as a sparse COO matrix, (N, d_sae)."""
        rows, places = self.values.nonzero(as_tuple=True)
        where = torch.stack([rows, self.indices[rows, places]])
        size, values = (len(self.values), self.d_sae), self.values[rows, places]
        return torch.sparse_coo_tensor(where, values, size, check_invariants=False).coalesce()

    def tensors(self) -> dict[str, Tensor]:
        """Return what there is one of per token, by name."""
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def of_tokens(self, rows: Tensor) -> SparseCodes:
        """Return the codes of some tokens; rows: their numbers, int64, or a mask."""
        return replace(self, **{name: value[rows] for name, value in self.tensors().items()})

    def or_better(self, other: SparseCodes) -> SparseCodes:
        """Return, for each token, whichever of two codes has the smaller residual."""
        better = (other.squared_residual < self.squared_residual).nonzero().squeeze(1)
        chosen = {}
        for name, values in replace(self, duality_gap=None).tensors().items():
            theirs = getattr(other, name)
            chosen[name] = widened(values, theirs).index_copy(
                0, better, widened(theirs, values)[better]
            )
        return replace(self, **chosen, duality_gap=None)


def widened(tensor: Tensor, other: Tensor) -> Tensor:
    """Add places to `tensor`, (N, k), until it has as many as `other`; (N,) stays as it is."""
    missing = other.shape[1] - tensor.shape[1] if tensor.ndim == 2 else 0
    return pad(tensor, (0, missing)) if missing > 0 else tensor


def compact_codes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values, (N, k), of codes (N, d_sae), dense or sparse."""
    if codes.layout == torch.strided:
        rows, latents = codes.nonzero(as_tuple=True)
        values = codes[rows, latents]
    else:
        entries = codes.to_sparse_coo().coalesce()
        (rows, latents), values = entries.indices(), entries.values()
    counts = rows.bincount(minlength=len(codes))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    k = max(1, int(counts.max()) if len(codes) else 0)
    compact = torch.zeros(len(codes), k, dtype=torch.int64, device=rows.device)
    magnitudes = values.new_zeros(len(codes), k)
    compact[rows, place], magnitudes[rows, place] = latents, values
    return compact, magnitudes
