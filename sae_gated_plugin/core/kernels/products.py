"""The sparse products: sums of rows over the entries of a token or a latent, and dot products.

A support's entries are sorted by token, or through `order` by latent; either way each segment of
them gives one row of the result. Segments differ: a latent may fire on half of all tokens and the
next on none. So the entries are cut into parts of PART, regardless of segments; a part that lies in
one segment is a program of its own, and that segment's program leaves it out. The result depends
on the support alone: the same bits every time.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# (Triton's language has no types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _outside_whole_parts(low, high, PART: tl.constexpr):
    """Entries low to high of a segment without the parts that lie in it.

    Returns how many are left, how many of them come before the whole parts, and the first and the
    last of these parts, plus one.
    """
    first = tl.cdiv(low, PART)
    last = tl.maximum(high // PART, first)
    before = tl.where(last > first, first * PART - low, high - low)
    return high - low - (last - first) * PART, before, first, last


@triton.jit
def _weighted_sums(
    low,
    count,
    before,
    skipped,
    index,
    order,
    values_1,
    values_2,
    rows,
    width,
    TWO: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums over `count` entries from `low` on, `skipped` left out after the first `before`."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    sum_1 = tl.zeros((BLOCK,), dtype=ACC)
    sum_2 = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, count, E):
        nth = start + tl.arange(0, E)
        valid = nth < count
        entry = low + nth + tl.where(nth < before, 0, skipped)
        at = tl.load(index + entry, mask=valid, other=0).to(tl.int64)
        if ORDERED:
            entry = tl.load(order + entry, mask=valid, other=0)
        found = tl.load(
            rows + at[:, None] * width + column[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        ).to(ACC)
        value = tl.load(values_1 + entry, mask=valid, other=0.0).to(ACC)
        sum_1 += tl.sum(found * value[:, None], 0)
        if TWO:
            value = tl.load(values_2 + entry, mask=valid, other=0.0).to(ACC)
            sum_2 += tl.sum(found * value[:, None], 0)
    return sum_1, sum_2


@triton.jit
def sum_parts(
    segment,
    index,
    order,
    values_1,
    values_2,
    rows,
    parts_1,
    parts_2,
    width,
    TWO: tl.constexpr,
    ORDERED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sum of one part's entries, if all are of one segment.

    segment: (nnz,), of each entry; parts_1, parts_2: (nnz // PART, width),
    written only for such parts; the rest as in `sum_segments`. One program per part.
    """
    part = tl.program_id(0).to(tl.int64)
    low = part * PART
    begin, end = low, low + PART - 1
    if ORDERED:
        begin, end = tl.load(order + begin), tl.load(order + end)
    if tl.load(segment + begin) != tl.load(segment + end):
        return
    sum_1, sum_2 = _weighted_sums(
        low, PART, PART, 0, index, order, values_1, values_2, rows, width,
        TWO, ORDERED, BLOCK, E, ACC,
    )  # fmt: skip
    column = tl.arange(0, BLOCK)
    tl.store(parts_1 + part * width + column, sum_1, mask=column < width)
    if TWO:
        tl.store(parts_2 + part * width + column, sum_2, mask=column < width)


@triton.jit
def sum_segments(
    offsets,
    index,
    order,
    values_1,
    values_2,
    rows,
    parts_1,
    parts_2,
    along,
    out_1,
    out_2,
    width,
    TWO: tl.constexpr,
    ORDERED: tl.constexpr,
    TANGENT: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[s] = sum of values[e] * rows[index[e]] over the entries of segment s.

    offsets: (segments + 1,); index: (nnz,), in the order of the sum; values_1, values_2: (nnz,),
    ORDERED: read through order (nnz,); rows: (n, width); out_1, out_2: (segments, width), the
    second with TWO only. With TANGENT, out_1[s] loses its part along the unit row along[s].
    BLOCK: a power of two, at least `width`; E entries are read at a time. One program per segment,
    after `sum_parts`.
    """
    segment = tl.program_id(0).to(tl.int64)
    low, high = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    count, before, first, last = _outside_whole_parts(low, high, PART)
    sum_1, sum_2 = _weighted_sums(
        low, count, before, (last - first) * PART, index, order, values_1, values_2, rows, width,
        TWO, ORDERED, BLOCK, E, ACC,
    )  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < width
    for part in range(first, last):
        sum_1 += tl.load(parts_1 + part * width + column, mask=inside, other=0.0)
        if TWO:
            sum_2 += tl.load(parts_2 + part * width + column, mask=inside, other=0.0)
    if TANGENT:
        unit = tl.load(along + segment * width + column, mask=inside, other=0.0).to(ACC)
        sum_1 -= unit * tl.sum(unit * sum_1, 0)
    tl.store(out_1 + segment * width + column, sum_1, mask=inside)
    if TWO:
        tl.store(out_2 + segment * width + column, sum_2, mask=inside)


@triton.jit
def dot_products(
    crow,
    row,
    col,
    left_1,
    left_2,
    rows,
    threshold,
    out_1,
    out_2,
    n_tokens,
    width,
    TWO: tl.constexpr,
    COMPARED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[e] = left[token] . rows[latent] for the entries of one token or of one whole part.

    crow: (N + 1,); row, col: (nnz,); left_1, left_2: (N, width); rows: (d_sae, width); out_1,
    out_2: (nnz,), the second with TWO. COMPARED: out_2 instead says by 1 or 0 whether out_1 exceeds
    threshold[latent]. One program per token, then one per part of PART entries.
    """
    program = tl.program_id(0).to(tl.int64)
    part = tl.maximum(program - n_tokens, 0)
    is_part = program >= n_tokens
    token = program
    if is_part:
        token = tl.load(row + part * PART).to(tl.int64)
    low, high = tl.load(crow + token), tl.load(crow + token + 1)
    count, before, first, last = _outside_whole_parts(low, high, PART)
    if is_part:
        count = tl.where((part >= first) & (part < last), PART, 0).to(count.dtype)
        low = part * PART
        before = low * 0 + PART
    skipped = (last - first) * PART
    column = tl.arange(0, BLOCK)
    inside = column < width
    a_1 = tl.load(left_1 + token * width + column, mask=inside, other=0.0).to(ACC)
    if TWO:
        a_2 = tl.load(left_2 + token * width + column, mask=inside, other=0.0).to(ACC)
    for start in range(0, count, E):
        nth = start + tl.arange(0, E)
        valid = nth < count
        entry = low + nth + tl.where(nth < before, 0, skipped)
        latent = tl.load(col + entry, mask=valid, other=0).to(tl.int64)
        found = tl.load(
            rows + latent[:, None] * width + column[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        ).to(ACC)
        dot = tl.sum(found * a_1[None, :], 1)
        tl.store(out_1 + entry, dot, mask=valid)
        if TWO:
            tl.store(out_2 + entry, tl.sum(found * a_2[None, :], 1), mask=valid)
        if COMPARED:
            exceeds = dot > tl.load(threshold + latent, mask=valid, other=0.0)
            tl.store(out_2 + entry, exceeds.to(ACC), mask=valid)


@triton.jit
def sum_entries(
    offsets, order, values, out, n_segments, L: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr
):
    """out[s] = sum of values[order[e]] over the entries of segment s.

    offsets: (n_segments + 1,); order, values: (nnz,); out: (n_segments,). One program per L
    segments, which reads E entries of each at a time.
    """
    segment = tl.program_id(0).to(tl.int64) * L + tl.arange(0, L)
    is_segment = segment < n_segments
    low = tl.load(offsets + segment, mask=is_segment, other=0)
    high = tl.load(offsets + segment + 1, mask=is_segment, other=0)
    total = tl.zeros((L,), dtype=ACC)
    for start in range(0, tl.max(high - low, 0), E):
        entry = low[:, None] + start + tl.arange(0, E)[None, :]
        valid = entry < high[:, None]
        at = tl.load(order + entry, mask=valid, other=0)
        total += tl.sum(tl.load(values + at, mask=valid, other=0.0).to(ACC), 1)
    tl.store(out + segment, total, mask=is_segment)
