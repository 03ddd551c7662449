"""What has to happen around an optimizer's step, for parameters that one of our SAEs has marked.

SAELens's trainer builds the optimizer and has no hook around its step; torch has global ones. Ours
look for attributes of parameters and touch nothing else:

    sae_gated_unit_norm     rows back to norm 1 after every step, the last one included
    sae_gated_reset         latents, (n,) int64, whose Adam moments start again at zero, once, and
                            the axis of the parameter that counts latents
    sae_gated_lr_scale      factor on the learning rate of the whole group, for this step
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


@torch.no_grad()
def renormalize_(W_dec: Tensor) -> None:
    """Scale the rows of W_dec (d_sae, d_in) to norm 1, in place; zero rows stay zero."""
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    W_dec.div_(norms.clamp_min_(torch.finfo(W_dec.dtype).tiny))


@cache
def install() -> None:
    """Register the two global hooks, once per process."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for group, parameter in _parameters(optimizer):
        reset = getattr(parameter, "sae_gated_reset", None)
        if reset is not None:
            _reset_moments(optimizer.state.get(parameter, {}), parameter, *reset)
            del parameter.sae_gated_reset  # type: ignore[attr-defined]
        scale = getattr(parameter, "sae_gated_lr_scale", 1.0)
        if scale != 1.0:
            group["sae_gated_lr"] = group["lr"]
            group["lr"] = group["lr"] * scale


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group, parameter in _parameters(optimizer):
        if "sae_gated_lr" in group:
            group["lr"] = group.pop("sae_gated_lr")
        if getattr(parameter, "sae_gated_unit_norm", False):
            renormalize_(parameter)


def _parameters(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _reset_moments(state: dict[str, Any], parameter: Tensor, latents: Tensor, axis: int) -> None:
    """Zero every moment of `latents`, which the parameter has on this axis."""
    for moment in state.values():
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            moment.movedim(axis, 0)[latents] = 0
