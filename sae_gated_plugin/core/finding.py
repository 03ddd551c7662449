"""Finding the support with torch's own operations: the product itself, or screened by bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from .gradients import latent_rows
from .support import Support, flat_nonzero, make_support

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
    for flat, block, start in _blocks(centred, W_enc, threshold, torch.gt):
        flats.append(flat + start)
        values.append(block.view(-1)[flat])
    return make_support(torch.cat(flats), centred.shape[0], W_enc.shape[1]), torch.cat(values)


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
        yield flat_nonzero(mask[:rows]), product, start * d_sae


def screened(centred: Tensor, W_enc: Tensor, threshold: Tensor) -> Support | None:
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
    return make_support(torch.cat(flats), n_tokens, W_enc.shape[1])


@cache
def fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are much faster than float32's on this device."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
