"""Triton versions of the two sparse products of `sparse.py`, as torch operators.

`torch.library` gives them names and shapes, so `torch.compile` passes over them without looking in.
Both accumulate in float32, or float64 for float64 input.

With TRITON_INTERPRET=1 in the environment before this module is imported they run on the CPU.
"""

# pyright: basic, reportArgumentType=false
# (Triton's language has no types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather_sum_kernel(
    index, rows, offsets, weights, out, width, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=ACC)
    for entry in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
        row = tl.load(rows + tl.load(index + entry) * width + column, mask=inside, other=0.0)
        total += tl.load(weights + entry).to(ACC) * row.to(ACC)
    tl.store(out + bag * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sampled_kernel(
    left,
    right,
    row,
    col,
    out,
    n_entries,
    width,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    valid = entry < n_entries
    left_start = tl.load(row + entry, mask=valid, other=0) * width
    right_start = tl.load(col + entry, mask=valid, other=0) * width
    total = tl.zeros((ENTRIES,), dtype=ACC)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = valid[:, None] & (column < width)[None, :]
        a = tl.load(left + left_start[:, None] + column[None, :], mask=inside, other=0.0)
        b = tl.load(right + right_start[:, None] + column[None, :], mask=inside, other=0.0)
        total += tl.sum(a.to(ACC) * b.to(ACC), axis=1)
    tl.store(out + entry, total.to(out.dtype.element_ty), mask=valid)


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@torch.library.custom_op("sae_gated::gather_sum", mutates_args=())
def gather_sum(index: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum of weights[e] * rows[index[e]] over e in offsets[b]:offsets[b + 1].

    index, weights: (nnz,); rows: (n, width), contiguous; offsets: (bags + 1,).
    Returns (bags, width).
    """
    n_bags, width = offsets.numel() - 1, rows.shape[1]
    out = rows.new_empty(n_bags, width)
    block = min(1024, triton.next_power_of_2(width))
    grid = (n_bags, triton.cdiv(width, block))
    _gather_sum_kernel[grid](
        index, rows, offsets, weights, out, width, BLOCK=block, ACC=_accumulator(rows.dtype)
    )
    return out


@gather_sum.register_fake
def _(index: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(offsets.numel() - 1, rows.shape[1])


@torch.library.custom_op("sae_gated::sampled", mutates_args=())
def sampled(left: Tensor, right: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """out[e] = left[row[e]] . right[col[e]].

    left: (n, width), right: (m, width), both contiguous; row, col: (nnz,). Returns (nnz,).
    """
    n_entries, width = row.numel(), left.shape[1]
    out = left.new_empty(n_entries)
    _sampled_kernel[(triton.cdiv(n_entries, 16),)](
        left,
        right,
        row,
        col,
        out,
        n_entries,
        width,
        ENTRIES=16,
        BLOCK=min(128, triton.next_power_of_2(width)),
        ACC=_accumulator(left.dtype),
    )
    return out


@sampled.register_fake
def _(left: Tensor, right: Tensor, row: Tensor, col: Tensor) -> Tensor:
    return left.new_empty(row.numel())
