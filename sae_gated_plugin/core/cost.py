"""Which form of a step is the cheaper one, by density, for a shape and a device.

On the CPU a constant. On CUDA a model of both forms' costs, for there the answer differs by orders
of magnitude: bfloat16 autocast makes the dense form several times cheaper, and small shapes are
bound by how fast the host can launch kernels. Nothing is timed at run time, so that the same seed
gives the same bits on every run and after a resume.

The yardstick is one Gated step, forward and backward: 7 dense products of N x d_in x d_sae and
passes over N x d_sae matrices against one screened product and 5 passes over the active entries'
rows. Other architectures leave out a decode in either form, which moves the crossover little.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

#: Share of active latents below which torch's sparse form is the faster one; see
#: `benchmarks/crossover.py` and the table in benchmarks/RESULTS.md.
CROSSOVER_DENSITY = {"cpu": 0.12, "cuda": 0.03}

#: Under bfloat16 autocast on a CPU whose bfloat16 products are fast that share is the first over
#: d_in, at most the second, the highest that was tried; measured likewise.
HALF_CROSSOVER, HIGHEST_CROSSOVER = 40, 0.2

#: Share of active latents above which screening costs more than it saves on the CPU: the exact
#: values of the candidates cost about 1e-4 ms each, the float32 product that they replace as much
#: as 3 % of them.
SCREEN_DENSITY = 0.03

#: Tokens, and at least so many latents, or all, whose pre-activations decide between the two forms
#: on the CPU; 64 x 4096 entries are plenty.
DENSITY_SAMPLE = 64
DENSITY_LATENTS = 4096

#: Fewer tokens than this are not worth the choice.
MIN_TOKENS = 4 * DENSITY_SAMPLE

#: What the sparse forms compute in.
SPARSE_DTYPES = (torch.float32, torch.float64)


class Card(NamedTuple):
    """What one multiprocessor does per second.

    tensor: operations of float16 or bfloat16 matrix products; vector: of float32 ones; stream:
    bytes of whole matrices read or written; gather: bytes of rows read by index.
    """

    tensor: float
    vector: float
    stream: float
    gather: float


#: By compute capability, the nearest one at or below; 9.0 measured on an H200, the others scaled by
#: their makers' figures.
CARDS = {
    (7, 0): Card(1.2e12, 0.16e12, 9e9, 12e9),
    (8, 0): Card(2.3e12, 0.16e12, 14e9, 20e9),
    (8, 6): Card(1.2e12, 0.35e12, 7e9, 12e9),
    (9, 0): Card(5.2e12, 0.39e12, 30e9, 30e9),
    (10, 0): Card(10e12, 0.40e12, 44e9, 44e9),
    (12, 0): Card(1.5e12, 0.45e12, 9e9, 14e9),
}

#: Products of a dense step, passes over its matrices in 4-byte numbers (autocast converts, and goes
#: on in float32), passes of a sparse step over the rows of its entries, and over W_enc and W_dec.
PRODUCTS, PASSES, AUTOCAST_PASSES, ROW_PASSES, WEIGHT_PASSES = 7, 46, 80, 5, 6

#: A float16 product with the comparison behind it takes so many times as long as a plain one.
SCREENING = 1.7

#: Seconds that the host needs to launch a step's kernels.
DENSE_HOST, SPARSE_HOST = 1.7e-3, 2.7e-3


class Shape(NamedTuple):
    """What the cost of a step depends on; half: the dense form runs in bfloat16 or float16."""

    n_tokens: int
    d_in: int
    d_sae: int
    itemsize: int
    half: bool


def break_even(shape: Shape, capability: tuple[int, int], multiprocessors: int) -> float:
    """The density, 0 to 1, below which the sparse form is the faster one on CUDA."""
    below = [known for known in CARDS if known <= capability]
    card = Card(*(multiprocessors * rate for rate in CARDS[max(below, default=min(CARDS))]))
    n_tokens, d_in, d_sae, itemsize, half = shape
    entries, weights = n_tokens * d_sae, d_in * d_sae * itemsize
    product = 2.0 * entries * d_in
    if half:
        dense = PRODUCTS * product / card.tensor + AUTOCAST_PASSES * entries * 4 / card.stream
    else:
        wider = itemsize / 4  # float64 takes twice as long, or more
        dense = wider * (PRODUCTS * product / card.vector + PASSES * entries * 4 / card.stream)
    dense = max(dense, DENSE_HOST)
    fixed = SCREENING * product / card.tensor + WEIGHT_PASSES * weights / card.stream
    if dense <= max(fixed, SPARSE_HOST):
        return 0.0
    return min(1.0, (dense - fixed) * card.gather / (ROW_PASSES * entries * d_in * itemsize))


@cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def crossover(x: torch.Tensor, W_enc: torch.Tensor, half: bool) -> float:
    """The density below which the CUDA kernels are faster than the dense form, for this product.

    x: (N, d_in); W_enc: (d_in, d_sae). half: autocast is on.
    """
    shape = Shape(x.shape[0], *W_enc.shape, itemsize=W_enc.itemsize, half=half)
    return break_even(shape, *_properties(x.device))
