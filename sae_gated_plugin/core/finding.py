"""Finding the support with torch's own operations: the product itself, or screened by bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .gradients import latent_rows
from .support import Support, flat_nonzero, greater, make_support

#: Share of a block's entries that may be candidates before screening gives up.
MAX_CANDIDATES = 0.25

#: Tokens per block of the encoder product, so that a block of `m` stays in cache.
BLOCK = 512


def find_support(
    centred: Tensor, W_enc: Tensor, threshold: Tensor, screen: bool = False
) -> tuple[Support, Tensor]:
    """The support of centred @ W_enc > threshold and the product's values there.

    centred: (N, d_in); W_enc: (d_in, d_sae); threshold: (d_sae,). screen: let a bfloat16 product
    rule out most entries first, for float32 only.
    """
    if screen and W_enc.dtype == torch.float32:
        candidates = screened(centred, W_enc, threshold)
        if candidates is not None:
            (exact,) = candidates.dot_products((centred,), latent_rows(W_enc))
            kept = flat_nonzero(exact > threshold.index_select(0, candidates.col))
            return candidates.chosen(kept), exact.index_select(0, kept)
    flats: list[Tensor] = []
    values: list[Tensor] = []
    for block, start in _blocks(centred, W_enc):
        flat = flat_nonzero(greater(block, threshold))
        flats.append(flat + start)
        values.append(block.view(-1)[flat])
    return make_support(torch.cat(flats), centred.shape[0], W_enc.shape[1]), torch.cat(values)


def _blocks(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, int]]:
    """left @ right in blocks of rows, each until the next is asked for, and its first position."""
    n_rows, d_sae = left.shape[0], right.shape[1]
    product = left.new_empty(min(BLOCK, n_rows), d_sae)
    for start in range(0, max(n_rows, 1), BLOCK):
        rows = min(BLOCK, n_rows - start)
        yield torch.mm(left[start : start + rows], right, out=product[:rows]), start * d_sae


def screened(centred: Tensor, W_enc: Tensor, threshold: Tensor) -> Support | None:
    """Every entry whose float32 product can exceed the threshold, and few others, by bfloat16.

    With x = x' + dx, w = w' + dw (primes: rounded to bfloat16) the product of the rounded factors
    is off by at most |dx| |w'| + |x| |dw|, and |w'| <= (1 + 2^-8) |w|. Summing K terms, in whatever
    order and in float32 with truncation, adds K 2^-22 |x| |w|; so much again is left for the
    float32 product that decides. Both are a number per token times one per latent, so they enter
    the matmul as two more columns, rounded up.

    The threshold enters it as two columns, its bfloat16 and the bfloat16 of the rest, rounded
    down; it is lowered before by what summing it can lose. So a candidate is a result without a
    sign, which rounding the result to bfloat16 does not change. What the hardware flushes to zero
    is below the last term.

    None where the bound is of no use: norms near overflow, NaN, or too many candidates.
    """
    d_in, d_sae = W_enc.shape
    x_low, x_norm, dx_norm = _rounded(centred)
    w_low, w_norm, dw_norm = _rounded(W_enc.T)
    x_max, w_max = x_norm.max().item(), w_norm.max().item()
    if not (x_max * w_max < 1e36 and threshold.abs().max().item() < 1e36):
        return None

    width = x_low.shape[1]
    u, summing = 2.0**-8, 2 * width * 2.0**-22
    up = 1 + 4 * u  # rounds up, with room for the norms' own rounding
    limit = threshold - summing * threshold.abs()
    limit = limit - 2.0**-126 * width * (4 + x_max + w_max)
    most = limit.bfloat16()
    rest = limit - most
    low = rest.bfloat16()
    low = torch.where(low > rest, low.nextafter(low.new_tensor(-torch.inf)), low)
    columns = (
        ((1 + u) * up * dx_norm, up * w_norm),
        (up * x_norm, up * (dw_norm + summing * w_norm)),
        (1, -most),
        (1, -low),
    )
    for column, (of_tokens, of_latents) in enumerate(columns, start=d_in):
        x_low[:, column], w_low[:, column] = of_tokens, of_latents

    flats: list[Tensor] = []
    for block, start in _blocks(x_low, w_low.T):
        flat = flat_nonzero(greater(block.view(torch.int16), -1))
        if flat.numel() > MAX_CANDIDATES * BLOCK * d_sae:
            return None
        flats.append(flat + start)
    return make_support(torch.cat(flats), centred.shape[0], d_sae)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, d_in) in bfloat16, with 4 columns to fill in and zeros up to a multiple of 32, which
    matrix units like; upper bounds of the norms of the rows and of what rounding took, (n,).
    """
    n, d_in = rows.shape
    low = rows.new_zeros(n, (d_in + 4 + 31) // 32 * 32, dtype=torch.bfloat16)
    norm, lost = rows.new_empty(n), rows.new_empty(n)
    for start in range(0, n, BLOCK):
        part = slice(start, start + BLOCK)
        low[part, :d_in] = rows[part]
        torch.linalg.vector_norm(rows[part], dim=1, out=norm[part])
        torch.linalg.vector_norm(rows[part] - low[part, :d_in], dim=1, out=lost[part])
    missed = d_in**0.5 * 2.0**-62  # by a norm, of numbers whose squares underflow
    return low, norm + missed, lost + missed


@cache
def fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are much faster than float32's on this device."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
