"""λ that finds its own value: a controller for `target_l0`.

It moves log λ by a small amount each step, in proportion to how far log L0 will be from its target
a little later, by its present slope; the farther away, the later. L0 answers to λ with a delay of
tens of steps and, since Adam's steps are bounded, no faster for a larger λ; a controller that
looked at the present alone would wind λ up, overshoot and kill latents.

Its state is one small tensor, a buffer of the training SAE: it is saved with every checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Chosen on the packaged model at learning rates from 5e-4 to 4e-3; see benchmarks/RESULTS.md.
GAIN = 0.1  # change of log λ per step and unit of error
HORIZON = 40.0  # steps ahead, near the target
FARTHER = 100.0  # steps more per unit of error, up to one
FAST, SLOW = 5.0, 20.0  # steps over which log L0 is averaged, for its level and its slope
MAX_ERROR = 0.5  # λ changes by at most 5 % per step


def new_state(device: torch.device | str) -> Tensor:
    """(4,) float32: log of λ over `l1_coefficient`, the two averages of log(L0/target), steps."""
    return torch.zeros(4, device=device, dtype=torch.float32)


@torch.no_grad()
def advance(state: Tensor, l0: Tensor, target: float, hold: bool) -> None:
    """Take in one batch's L0, a 0-d tensor; change log λ unless `hold`. In place, no host sync."""
    error = (l0.float().clamp_min(0.01 * target) / target).log()
    first = state[3] == 0
    for index, steps in ((1, FAST), (2, SLOW)):
        moved = state[index] + (error - state[index]) / steps
        state[index] = torch.where(first, error, moved)
    state[3] += 1
    if not hold:
        slope = (state[1] - state[2]) / (SLOW - FAST)
        horizon = HORIZON + FARTHER * state[1].abs().clamp_max(1)
        state[0] += GAIN * (state[1] + horizon * slope).clamp(-MAX_ERROR, MAX_ERROR)
