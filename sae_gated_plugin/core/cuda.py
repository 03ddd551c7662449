"""The CUDA form of the sparse core: finding the support and its products by Triton's kernels.

Its support are the candidates of `kernels.screening`, a few more entries than are active. Nothing
here waits for the GPU but `find`, once. Everything is deterministic: no sum depends on which
program comes first.

Shapes: N tokens, d_in, d_sae, nnz entries of the support.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from . import finding
from .kernels import products, screening
from .support import Part, Support

#: The widest rows that a kernel holds at once.
MAX_WIDTH = 16384

#: Entries per part; see `kernels.products`.
PART = 256

#: Bits of a word of the screened product.
WORD = 32

#: A support's entries are counted in int32.
MOST_ENTRIES = 2**31 - 1


class Tile(NamedTuple):
    """How `screening.screen` cuts the product, and what a program of it gets."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    num_warps: int
    num_stages: int


#: By shared memory in bytes that a program may have, the most demanding first.
TILES = {
    160 * 1024: Tile(128, 256, 64, 8, num_warps=8, num_stages=3),
    96 * 1024: Tile(128, 128, 64, 8, num_warps=8, num_stages=3),
    0: Tile(64, 64, 64, 8, num_warps=4, num_stages=2),
}


def tile_for(shared_memory: int) -> Tile:
    """The largest tile for so many bytes of shared memory."""
    return next(tile for needed, tile in TILES.items() if shared_memory >= needed)


@cache
def _tile(device: torch.device) -> Tile:
    if device.type != "cuda":  # Triton's interpreter: small, so that tests have several tiles
        return Tile(32, 64, 64, 2, num_warps=4, num_stages=1)
    properties = torch.cuda.get_device_properties(device)
    return tile_for(getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


def row_options(width: int) -> dict[str, Any]:
    """How a program holds rows of that width: some at a time, 32 numbers of them in each thread."""
    block = triton.next_power_of_2(width)
    warps = max(4, min(16, block // 512))
    return {"BLOCK": block, "E": max(1, min(16, warps * 1024 // block)), "num_warps": warps}


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Start `programs` programs of a kernel; the only place where one is started."""
    if not programs:
        return
    device = arguments[0].device
    # Triton launches on the current device, whatever its arguments are on.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        # Said here, or Triton 3.9 warns that its default will change.
        kernel[(programs,)](*arguments, enable_fp_fusion=True, **options)


def read(numbers: Tensor) -> list[float]:
    """The numbers on the host: the only place where it waits for the GPU."""
    return numbers.tolist()


# --- finding the support --------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """Rows in float16 and what `screening.round_rows` says of them.

    low: (n, padded width); measures: (3, n) float32, scale, norm, and norm of what was lost.
    """

    low: Tensor
    measures: Tensor


def rounded(rows: Tensor) -> Rounded:
    """`rows` (n, width), contiguous, in float16 with a scale per row."""
    n, width = rows.shape
    padded = triton.cdiv(width, screening.PADDING) * screening.PADDING
    low = rows.new_empty(n, padded, dtype=torch.float16)
    measures = rows.new_empty(3, n, dtype=torch.float32)
    launch(
        screening.round_rows,
        n,
        rows,
        low,
        *measures,
        width,
        padded,
        SMALLEST=screening.SMALLEST_SCALE,
        BLOCK=triton.next_power_of_2(padded),
        num_warps=row_options(padded)["num_warps"],
    )
    return Rounded(low, measures)


def screen(x: Rounded, w: Rounded, threshold: Tensor, most_sampled: int) -> tuple[Tensor, Tensor]:
    """Candidates for x w > threshold: words (N, d_sae / 32) int32 and counts (N,) int32.

    Where the first SAMPLE tokens have more than `most_sampled`, the others get neither.
    """
    (n_tokens, padded), d_sae = x.low.shape, w.low.shape[0]
    n_words = triton.cdiv(d_sae, WORD)
    words = x.low.new_empty(n_tokens, n_words, dtype=torch.int32)
    counts = x.low.new_zeros(n_tokens, dtype=torch.int32)
    tile = _tile(x.low.device)
    first = min(screening.SAMPLE, n_tokens)
    for start, stop in ((0, first), (first, n_tokens)):
        launch(
            screening.screen,
            triton.cdiv(stop - start, tile.BM) * triton.cdiv(d_sae, tile.BN),
            x.low,
            w.low,
            *x.measures,
            *w.measures,
            threshold,
            words,
            counts,
            n_tokens,
            d_sae,
            padded,
            n_words,
            start,
            stop,
            most_sampled,
            screening.summing_error(padded),
            SAMPLED=screening.SAMPLE,
            **tile._asdict(),
        )
    return words, counts


def find(
    centred: Tensor, rows: Tensor, threshold: Tensor, most: float
) -> tuple[CudaSupport, Tensor, Tensor] | None:
    """Support of centred @ rows.T > threshold: the candidates, their exact values, and 1 or 0.

    centred: (N, d_in), rows: (d_sae, d_in), both contiguous, float32 or float64; threshold:
    (d_sae,). The third tensor says which candidates exceed it, (nnz,) in the values' dtype.

    None where there are more than `most` candidates (a share of them all), and where the bound is
    of no use: NaN, infinity, or norms whose product is near overflow.
    """
    n_tokens, d_sae = centred.shape[0], rows.shape[0]
    x, w = rounded(centred), rounded(rows)
    sampled = min(screening.SAMPLE, n_tokens) * d_sae
    # A sample's share differs from the batch's: it closes the gate only where it is clear.
    most_sampled = int(min(1.25 * most * sampled + WORD, MOST_ENTRIES))
    words, counts = screen(x, w, threshold, most_sampled)
    crow = counts.new_zeros(n_tokens + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=crow[1:])
    numbers = [x.measures.amax(1), w.measures.amax(1)]
    tallies = torch.stack([counts[: screening.SAMPLE].sum(), crow[-1]])
    x_scale, x_norm, _, w_scale, w_norm, _, in_sample, total = read(
        torch.cat([torch.cat(numbers).double(), tallies.double()])
    )
    if not (max(x_scale, w_scale) <= screening.LARGEST_SCALE):
        return None
    if not x_scale * x_norm * w_scale * w_norm < 1e36:
        return None
    if in_sample > most_sampled or total > min(most * n_tokens * d_sae, MOST_ENTRIES):
        return None
    nnz = int(total)
    row, col = counts.new_empty(nnz), counts.new_empty(nnz)
    block = min(1024, triton.next_power_of_2(words.shape[1]))
    launch(
        screening.fill, n_tokens, words, crow, row, col, words.shape[1], BLOCK=block, num_warps=4
    )
    support = CudaSupport(crow, col, d_sae, row)
    values, active = support.compared(centred, rows, threshold)
    return support, values, active


# --- the products ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CudaSupport(Support):
    """A support of candidates, int32, with the products done by kernels.

    entry_tokens: (nnz,) int32, the token of each entry; whole: what this one is a cut of, with the
    same entries.
    """

    entry_tokens: Tensor
    whole: CudaSupport | None = None

    @property
    @override
    def row(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.entry_tokens

    @cached_property
    @override
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.whole is None:
            return self.sorted_by_latent()
        offsets, order, _ = self.whole.by_latent
        return offsets, order, self.row[order]

    @override
    def slices(self, latents: Sequence[slice]) -> list[Part]:
        """One part, each token cut into one for every slice: no size depends on the data."""
        row = self.row * len(latents)
        for part in latents[1:]:  # a tensor of them would have to be sent to the GPU
            row += self.col >= part.start
        edges = torch.arange(self.n_tokens * len(latents) + 1, device=row.device, dtype=row.dtype)
        crow = torch.searchsorted(row, edges)
        cut = CudaSupport(crow, self.col, self.d_sae, row, whole=self)
        return [Part(slice(0, self.d_sae), slice(None), cut)]

    @override
    def per_latent(self, parameter: Tensor) -> Tensor:
        return cast(Tensor, _PerLatent.apply(parameter, self))

    @override
    def totals_by_latent(self, values: Tensor) -> Tensor:
        offsets, order, _ = self.by_latent
        out = values.new_empty(self.d_sae)
        launch(
            products.sum_entries,
            triton.cdiv(self.d_sae, 16),
            offsets,
            order,
            values.contiguous(),
            out,
            self.d_sae,
            L=16,
            E=64,
            ACC=accumulator(values.dtype),
            num_warps=4,
        )
        return out

    @override
    def sums_by_token(self, values: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
        return _sums(self.crow, self.row, self.col, None, values, rows)

    @override
    def sum_by_latent(self, values: Tensor, rows: Tensor) -> Tensor:
        offsets, order, tokens = self.by_latent
        return _sums(offsets, self.col, tokens, order, (values,), rows)[0]

    @override
    def tangent_sum_by_latent(
        self, values: Tensor, rows: Tensor, unit: Tensor, dots: Tensor
    ) -> Tensor:
        offsets, order, tokens = self.by_latent
        return _sums(offsets, self.col, tokens, order, (values,), rows, unit)[0]

    @override
    def dot_products(self, lefts: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
        return self._dots(lefts, rows, None)

    def compared(self, left: Tensor, rows: Tensor, threshold: Tensor) -> list[Tensor]:
        """`dot_products` of one left, and by 1 or 0 whether they exceed threshold[latent]."""
        return self._dots((left, left), rows, threshold)

    def _dots(
        self, lefts: tuple[Tensor, ...], rows: Tensor, threshold: Tensor | None
    ) -> list[Tensor]:
        lefts, rows = tuple(left.contiguous() for left in lefts), rows.contiguous()
        nnz, width = self.col.numel(), rows.shape[1]
        out = [rows.new_empty(nnz) for _ in lefts]
        launch(
            products.dot_products,
            self.n_tokens + nnz // PART,
            self.crow,
            self.row,
            self.col,
            lefts[0],
            lefts[-1],
            rows,
            rows if threshold is None else threshold,
            out[0],
            out[-1],
            self.n_tokens,
            width,
            TWO=threshold is None and len(lefts) == 2,
            COMPARED=threshold is not None,
            PART=PART,
            ACC=accumulator(rows.dtype),
            **row_options(width),
        )
        return out


class _PerLatent(torch.autograd.Function):
    """A (d_sae,) parameter at each entry of a support; its gradient is summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, support: CudaSupport) -> Tensor:
        ctx.support = support
        return parameter.index_select(0, support.col)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return ctx.support.totals_by_latent(grads[0]), None


def _sums(
    offsets: Tensor,
    segment: Tensor,
    index: Tensor,
    order: Tensor | None,
    values: tuple[Tensor, ...],
    rows: Tensor,
    along: Tensor | None = None,
) -> list[Tensor]:
    rows = rows.contiguous()
    values = tuple(value.contiguous() for value in values)
    n_parts, width = index.numel() // PART, rows.shape[1]
    parts = [rows.new_empty(n_parts, width) for _ in values]
    out = [rows.new_empty(offsets.numel() - 1, width) for _ in values]
    entries = (index, index if order is None else order, values[0], values[-1], rows)
    options = {
        "TWO": len(values) == 2,
        "ORDERED": order is not None,
        "PART": PART,
        "ACC": accumulator(rows.dtype),
        **row_options(width),
    }
    launch(products.sum_parts, n_parts, segment, *entries, parts[0], parts[-1], width, **options)
    launch(
        products.sum_segments,
        len(out[0]),
        offsets,
        *entries,
        parts[0],
        parts[-1],
        rows if along is None else along.contiguous(),
        out[0],
        out[-1],
        width,
        TANGENT=along is not None,
        **options,
    )
    return out


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of numbers of that dtype are added up in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def check(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Run every kernel on a small problem of rows of that width and compare it with torch.

    Raises whatever a kernel's compilation does, and ArithmeticError where it disagrees.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"rows are at most {MAX_WIDTH} wide")
    generator = torch.Generator().manual_seed(0)
    n_tokens, d_sae = 2 * screening.SAMPLE, 3 * WORD + 1
    draw = torch.randn(2 * n_tokens + d_sae, width, generator=generator, dtype=dtype).to(device)
    x, y, rows = draw.split([n_tokens, n_tokens, d_sae])
    rows = torch.nn.functional.normalize(rows, dim=1)
    threshold = rows.new_full((d_sae,), 1.0)
    threshold[0] = -torch.inf  # a latent that is active everywhere, for whole parts
    found = find(x, rows, threshold, 1.0)
    if found is None:
        raise ArithmeticError("no support was found")
    support, values, active = found
    expected, _ = finding.find_support(x, rows.T, threshold)
    if not torch.equal(support.flat[active.bool()], expected.flat):
        raise ArithmeticError("another support was found than by the product itself")
    plain = Support(support.crow, support.col.long(), d_sae)
    both = (values, active)
    comparisons = {"values": ([values], plain.dot_products((x,), rows))}
    for name, arguments in {
        "sums_by_token": (both[:1], rows),
        "sums_by_token of two": (both, rows),
        "dot_products": ((x,), rows),
        "dot_products of two": ((x, y), rows),
        "sum_by_latent": (values, x),
        "tangent_sum_by_latent": (values, x, rows, values),
        "totals_by_latent": (values,),
    }.items():
        method = name.partition(" ")[0]
        outs = [getattr(of, method)(*arguments) for of in (support, plain)]
        pair = [out if isinstance(out, list) else [out] for out in outs]
        comparisons[name] = (pair[0], pair[1])
    for name, (ours, torchs) in comparisons.items():
        for one, other in zip(ours, torchs):
            error = float((one - other).norm() / other.norm().clamp_min(1e-30))
            if not error < 1e-4:
                raise ArithmeticError(f"{name} differs from torch's by {error:.1e}")
