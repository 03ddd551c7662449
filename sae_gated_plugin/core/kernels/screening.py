"""Which entries of x W_enc can exceed their threshold: three kernels that never store the product.

`round_rows` gives a float16 copy of each row and says what rounding lost; `screen` multiplies the
copies, adds a bound on the error and packs the comparison's results, 32 to a word; `fill` turns the
words into a support in compressed sparse row form.

The bound. A row x is scaled by a power of two s, its largest entry's or SMALLEST_SCALE: u = x / s
is exact in binary (what a subnormal loses is below the absolute term at the end), and so is
a = u - u', the loss of rounding u to float16 u', for u' and u share their leading bits. With v, v'
and b = v - v' for a latent's row,

    u.v - u'.v' = a.(v - b) + u.b,   so   |u.v - u'.v'| <= |a| (|v| + |b|) + |u| |b|.

The matrix unit adds 16 products of 11-bit numbers, which are exact, to the sum so far; it aligns
the 17 terms to the largest and may cut each at its 24th bit, so it loses at most 17 * 2^-23 of the
largest. No term or sum so far exceeds p q, with p = |u| + |a| >= |u'| and q = |v| + |b| >= |v'|
(Cauchy-Schwarz), and there are K / 16 such steps: (17 / 16) K 2^-23 p q in all. The float32 product
that decides at the end, K terms in any order, may exceed the exact one by K 2^-24 p q; 64 * 2^-23
more cover the arithmetic of the bound itself and the threshold's rounding to float32. So

    u'.v' + |a| q + |u| |b| + summing p q + 2^-24  >  threshold / (s_x s_w)

holds wherever the float32 product exceeds the threshold, with `summing` as in `summing_error`. The
norms are rounded up: their float32 sums of K <= 16384 squares are off by less than 2^-11 of
themselves, and squares that underflow add less than 2^-50. Dividing the threshold by both scales
is exact but for under- and overflow. What underflows is off by 2^-126 at first and by 2^-26 after
the second scale, at least SMALLEST_SCALE = 2^-100, which is what 2^-24 is there for. What overflows
is larger than 2^28 after the second scale, at most LARGEST_SCALE = 2^100, and no product of two
scaled rows, entries below 2, is that large.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl

#: Powers of two that a row may be scaled by; see the bound.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**100

#: What norms are rounded up by.
UP = tl.constexpr(1.0 + 2.0**-10)

#: The screened rows' widths are multiples of this, with zeros at the end.
PADDING = 64

#: Tokens that are screened first; where they have too many candidates, the others are left out.
SAMPLE = 128


def summing_error(width: int) -> float:
    """What float32 sums of `width` products lose, as a share of the factors' norms."""
    return (width * (17 / 16 + 1 / 2) + 64) * 2.0**-23


@triton.jit
def round_rows(
    rows, low, scale, norm, lost, width, padded, SMALLEST: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: its float16 copy, scaled, its norm and that of what rounding lost, both rounded up.

    rows: (n, width), float32 or float64; low: (n, padded) float16, row / scale; scale, norm, lost:
    (n,) float32, the norms being those of the scaled row. NaN or infinity in a row show in `norm`
    or `scale`. BLOCK: a power of two, at least `padded`. One program per row.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exact = tl.load(rows + row * width + column, mask=column < width, other=0.0)
    top = tl.max(tl.abs(exact), 0).to(tl.float32)
    # The exponent alone, without sign and mantissa, is the power of two at or below it.
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, SMALLEST)
    unit = exact * (1.0 / power)
    rounded = unit.to(tl.float16)
    left = unit - rounded.to(unit.dtype)
    tl.store(low + row * padded + column, rounded, mask=column < padded)
    tl.store(scale + row, power)
    tl.store(norm + row, tl.sqrt(tl.sum(unit * unit, 0)).to(tl.float32) * UP)
    tl.store(lost + row, tl.sqrt(tl.sum(left * left, 0)).to(tl.float32) * UP + 2.0**-50)


@triton.jit
def screen(
    x_low,
    w_low,
    x_scale,
    x_norm,
    x_lost,
    w_scale,
    w_norm,
    w_lost,
    threshold,
    words,
    counts,
    n_tokens,
    d_sae,
    padded,
    n_words,
    start,
    stop,
    most,
    summing,
    SAMPLED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of tokens by latents: candidates as bits, and how many each token has.

    x_low: (n_tokens, padded), w_low: (d_sae, padded), with the scales and norms of `round_rows`;
    threshold: (d_sae,); words: (n_tokens, n_words) int32, written whole; counts: (n_tokens,) int32,
    zero before. Tokens start to stop are looked at; the others too are in memory. After the first
    call, of SAMPLED tokens (start = 0), a second one does nothing where those have more than
    `most` candidates. One program per BM x BN tile, GROUP tiles of tokens at a time, so that the
    latents' rows are read from the cache.
    """
    nth = tl.arange(0, SAMPLED)
    sampled = tl.sum(tl.load(counts + nth, mask=nth < start, other=0), 0)
    if sampled > most:
        return
    pid = tl.program_id(0)
    n_m = tl.cdiv(stop - start, BM)
    per_group = GROUP * tl.cdiv(d_sae, BN)
    group = pid // per_group * GROUP
    size = tl.minimum(n_m - group, GROUP)
    tile_m = group + pid % per_group % size
    tile_n = pid % per_group // size

    token = start + tile_m * BM + tl.arange(0, BM)
    latent = tile_n * BN + tl.arange(0, BN)
    is_token, is_latent = token < stop, latent < d_sae
    token_read = tl.where(is_token, token, 0)
    latent_read = tl.where(is_latent, latent, 0)
    k = tl.arange(0, BK)
    left = x_low + token_read[:, None].to(tl.int64) * padded + k[None, :]
    right = w_low + latent_read[None, :].to(tl.int64) * padded + k[:, None]
    product = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, padded, BK):
        product = tl.dot(tl.load(left), tl.load(right), product)
        left += BK
        right += BK

    a, u = tl.load(x_lost + token_read), tl.load(x_norm + token_read)
    b, v = tl.load(w_lost + latent_read), tl.load(w_norm + latent_read)
    product += (a + summing * (u + a))[:, None] * (v + b)[None, :]
    product += u[:, None] * b[None, :] + 2.0**-24
    limit = tl.load(threshold + latent_read) * (1.0 / tl.load(w_scale + latent_read))
    limit = limit.to(tl.float32)[None, :] * (1.0 / tl.load(x_scale + token_read))[:, None]
    hit = ((product > limit) & is_token[:, None] & is_latent[None, :]).to(tl.int32)

    bits = tl.reshape(hit, (BM, BN // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = tile_n * (BN // 32) + tl.arange(0, BN // 32)
    tl.store(
        words + token[:, None].to(tl.int64) * n_words + word[None, :],
        tl.sum(bits, 2),
        mask=is_token[:, None] & (word < n_words)[None, :],
    )
    tl.atomic_add(counts + token, tl.sum(hit, 1), mask=is_token)


@triton.jit
def _count_bits(word):
    """Ones in each uint32: pairs, nibbles and bytes are summed side by side."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def fill(words, crow, row, col, n_words, BLOCK: tl.constexpr):
    """One token's candidates, ascending, from its words.

    words: (N, n_words) int32; crow: (N + 1,), where each token's entries begin; row, col: (nnz,)
    int32, written. One program per token, which looks at BLOCK words at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(crow + token)
    for first in range(0, n_words, BLOCK):
        word = first + tl.arange(0, BLOCK)
        bits = tl.load(words + token * n_words + word, mask=word < n_words, other=0)
        bits = bits.to(tl.uint32, bitcast=True)
        count = _count_bits(bits)
        entry = start + tl.cumsum(count, 0) - count
        start += tl.sum(count, 0)
        # Few words have more than one candidate: two or three rounds are enough for most blocks.
        while tl.max(bits, 0) > 0:
            rest = bits & (bits - 1)
            below = (bits ^ rest) - 1  # ones below the lowest one
            tl.store(col + entry, word * 32 + _count_bits(below), mask=bits > 0)
            tl.store(row + entry, tl.zeros_like(word) + token.to(tl.int32), mask=bits > 0)
            entry += (bits > 0).to(tl.int32)
            bits = rest
