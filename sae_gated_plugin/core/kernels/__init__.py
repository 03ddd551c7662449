"""Which implementation of a sparse product to run on a GPU: torch's own or a Triton kernel.

Nobody can know beforehand: it depends on the card, the shape and the version of torch. So the
first product of each operation, device, dtype and width is run by every candidate, timed and
compared with torch's result, and the fastest is remembered for the process and logged. A kernel
that does not compile, or disagrees, is never used; the log says why.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Hashable
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger("sae_gated_plugin")

ROUNDS = 5

#: (operation, device, dtype, width) -> name of the fastest candidate.
chosen: dict[Hashable, str] = {}


def has_triton() -> bool:
    """Whether the package is there; whether it works shows when a kernel is tried."""
    return find_spec("triton") is not None


def fastest(key: Hashable, candidates: dict[str, Callable[[], Tensor]]) -> Tensor:
    """Run the candidate that was fastest for this key; the first one is the reference.

    Raises whatever the reference raises.
    """
    if key not in chosen:
        chosen[key] = _calibrate(key, candidates)
    return candidates[chosen[key]]()


def _calibrate(key: Hashable, candidates: dict[str, Callable[[], Tensor]]) -> str:
    reference, *others = candidates
    expected = candidates[reference]()
    seconds = {reference: _median_seconds(candidates[reference], expected.device)}
    for name in others:
        try:
            found = candidates[name]()
            error = (found - expected).norm() / expected.norm().clamp_min(1e-30)
            if not error < 1e-4:
                raise ArithmeticError(f"differs from {reference} by {error:.1e}")
            seconds[name] = _median_seconds(candidates[name], expected.device)
        except Exception as reason:  # a compiler's errors have no common class
            logger.warning("%s: %s is not used: %s", key, name, reason)
    best = min(seconds, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items())
    logger.info("%s: %s from now on (%s)", key, best, times)
    return best


def _median_seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    def once() -> float:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(ROUNDS))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
