"""Which form of the core computes a batch: dense, torch's sparse one, or Triton's kernels.

Decided here and nowhere else. On the CPU torch's sparse form runs, or the dense one by the density
of the batch. On CUDA the kernels run, or the dense form by `cost.break_even`; torch's sparse form
is what is left where Triton is missing or a kernel fails.

The environment variable SAE_GATED_CUDA overrides this on CUDA: `torch` leaves the kernels out,
`dense` takes the dense form for everything, `triton` (the default) is as said above.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from . import cost
from .finding import fast_bfloat16, find_support
from .gradients import latent_rows
from .support import Backend, Support

logger = logging.getLogger("sae_gated_plugin")

SWITCH = "SAE_GATED_CUDA"

#: Types of devices that the kernels run on.
KERNEL_DEVICES = {"cuda"}


def on_gpu(tensor: Tensor) -> bool:
    """Whether reading a number of this tensor would make the host wait."""
    return tensor.device.type in KERNEL_DEVICES


def on_its_way(number: Tensor) -> Callable[[], float]:
    """Send a 0-d tensor to the host; what is returned gives it there, and waits if it must.

    Called after later work on the same GPU has been waited for, it need not.
    """
    if not number.is_cuda:
        return number.item
    host = torch.empty((), dtype=number.dtype, pin_memory=True)
    host.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def arrival() -> float:
        arrived.synchronize()
        return host.item()

    return arrival


class Found(NamedTuple):
    """A support, m = (x - b_dec) W_enc on it, (nnz,), and which entries are active.

    mask: (nnz,), 1 where active and 0 elsewhere; None where all are.
    """

    support: Support
    values: Tensor
    mask: Tensor | None


def find(
    centred: Tensor, W_enc: Tensor, threshold: Tensor, backend: Backend, half: bool
) -> Found | None:
    """The active entries of centred @ W_enc > threshold, or None for the dense form.

    centred: (N, d_in), W_enc: (d_in, d_sae), threshold: (d_sae,). backend: "auto" decides, "sparse"
    and "dense" are obeyed. half: autocast is on, so that the dense form is cheap.
    """
    gpu = on_gpu(centred)
    if backend == "dense" or (gpu and _switch() == "dense"):
        return None
    if backend == "auto" and (
        centred.shape[0] < cost.MIN_TOKENS or W_enc.dtype not in cost.SPARSE_DTYPES
    ):
        return None
    empty = not centred.numel() or not W_enc.numel()
    if gpu and not empty and kernels_work(centred.device, W_enc.dtype, W_enc.shape[0]):
        return _with_kernels(centred, W_enc, threshold, backend, half)
    screen = False
    if backend == "auto":
        density = measured_density(centred, W_enc, threshold)
        if density >= sparse_below(centred.device.type, W_enc.shape[0], half):
            return None
        screen = density < cost.SCREEN_DENSITY and fast_bfloat16(centred.device.type)
    return Found(*find_support(centred, W_enc, threshold, screen), None)


def sparse_below(device: str, d_in: int, half: bool) -> float:
    """The density below which torch's sparse form is the faster one. half: autocast is on."""
    if half and fast_bfloat16(device):
        return min(cost.HALF_CROSSOVER / d_in, cost.HIGHEST_CROSSOVER)
    return cost.CROSSOVER_DENSITY.get(device, 0.0)


def _with_kernels(
    centred: Tensor, W_enc: Tensor, threshold: Tensor, backend: Backend, half: bool
) -> Found | None:
    from . import cuda

    most = cost.crossover(centred, W_enc, half) if backend == "auto" else 1.0
    if not most:
        return None
    found = cuda.find(centred.contiguous(), latent_rows(W_enc), threshold, most)
    if found is None and backend == "sparse":
        return Found(*find_support(centred, W_enc, threshold), None)
    return None if found is None else Found(*found)


def measured_density(centred: Tensor, W_enc: Tensor, threshold: Tensor) -> float:
    """Share of active latents in a sample; 1 where the sparse form cannot be taken.

    NaN exceeds no threshold: the sparse form would give such a token no latents instead of NaN.
    """
    if not centred.sum().isfinite():
        return 1.0
    every = max(1, W_enc.shape[1] // cost.DENSITY_LATENTS)
    sample = centred[: cost.DENSITY_SAMPLE] @ W_enc[:, ::every]
    return share_of(sample > threshold[::every])


def share_of(mask: Tensor) -> float:
    """Share of True in a mask; 0 in an empty one."""
    return mask.count_nonzero().item() / max(1, mask.numel())


def _switch() -> str:
    value = os.environ.get(SWITCH, "triton")
    if value not in ("triton", "torch", "dense"):
        raise ConfigError(f"{SWITCH} is '{value}'; allowed: triton, torch, dense.")
    return value


def kernels_work(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether Triton's kernels may be used for rows of that dtype and width on that device."""
    if _switch() != "triton" or dtype not in cost.SPARSE_DTYPES or find_spec("triton") is None:
        return False
    return _tried(device, dtype, width)


@cache
def _tried(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Compile the kernels and compare them with torch on a small problem; once per process.

    A kernel that does not compile, or disagrees, is never used; the log says why.
    """
    try:
        from . import cuda

        cuda.check(device, dtype, width)
    except Exception as reason:  # a compiler's errors have no common class
        logger.warning(
            "The sparse kernels are not used for %s of width %d on %s, torch's sparse products "
            "are: %s. %s=dense would leave these out too.",
            *(dtype, width, device, " ".join(str(reason).split())[:500], SWITCH),
        )
        return False
    return True
