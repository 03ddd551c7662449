"""The sparse products: decode, sampled product, sums by latent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from . import kernels
from .support import Support


def latent_rows(weight: Tensor) -> Tensor:
    """(d_in, d_sae) as contiguous (d_sae, d_in) rows; free for a column-contiguous weight."""
    return weight.T.contiguous()


def gather_rows(support: Support, values: Tensor, rows: Tensor) -> Tensor:
    """out[t] = sum of values * rows[latent] over the token's entries; rows (d_sae, d_in)."""
    return _bags(support.col, rows, support.crow, values)


def gather_sum_by_latent(support: Support, values: Tensor, rows: Tensor) -> Tensor:
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


def sampled_product(left: Tensor, right: Tensor, support: Support) -> Tensor:
    """(left @ right) on the support, (nnz,); left (N, d), right (d, d_sae)."""
    left, rows = left.contiguous(), latent_rows(right)
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
