"""The two sparse products that `Support` needs, by torch's own operations."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .support import Support


def bags(index: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum of weights[e] * rows[index[e]] over e in offsets[b]:offsets[b + 1].

    index, weights: (nnz,); rows: (n, width); offsets: (bags + 1,). Returns (bags, width).
    """
    if index.numel() == 0:
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    # The fastest of torch's sparse products here, and the only one that neither needs MKL nor
    # warns about beta CSR tensors.
    return torch.nn.functional.embedding_bag(
        index,
        rows.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def sampled(left: Tensor, rows: Tensor, support: Support) -> Tensor:
    """left[token] . rows[latent] on the support, (nnz,); left (N, width), rows (d_sae, width)."""
    left, rows = left.contiguous(), rows.contiguous()
    if support.col.numel() == 0:
        return left.new_empty(0)
    # On a GPU torch warns of invariants that it does not check; there the kernels are used anyway.
    if left.device.type != "cpu" or not has_sampled_addmm():
        return sampled_by_gather(left, rows, support)
    pattern = torch.sparse_csr_tensor(
        support.crow,
        support.col,
        left.new_zeros(support.col.numel()),
        (support.n_tokens, support.d_sae),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, left, rows.T, beta=0.0).values()


def sampled_by_gather(left: Tensor, rows: Tensor, support: Support) -> Tensor:
    """`sampled` without CSR tensors, for builds of torch that refuse them; slower."""
    out = left.new_empty(support.col.numel())
    size = 8192 if left.device.type == "cpu" else 32768
    for start in range(0, out.numel(), size):
        part = slice(start, start + size)
        out[part] = (left[support.row[part]] * rows[support.col[part]]).sum(1)
    return out


@cache
def has_sampled_addmm() -> bool:
    """Whether this build of torch has the sampled product on the CPU; asked once, quietly."""
    with warnings.catch_warnings():
        # "Sparse CSR tensor support is in beta" is emitted once, here, and not shown.
        warnings.simplefilter("ignore")
        try:
            one = torch.ones(1, 1)
            torch.sparse.sampled_addmm(one.to_sparse_csr(), one, one, beta=0.0)
        except RuntimeError:
            return False
    return True
