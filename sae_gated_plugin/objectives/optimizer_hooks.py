"""What has to happen around an optimizer's step, for the parameters of our training SAEs.

SAELens's trainer builds the optimizer and has no hook around its step; torch has global ones. Ours
know the SAEs that are alive and look up in every step, by identity, which of their parameters the
optimizer holds: copies, unpickled SAEs and replaced parameters need no mark. For those parameters

    unit norm        rows of W_dec go back to norm 1 after every step, the last one included
    soft-frozen      and those of this control back to the neighbourhood of their start
    moments          those of rewritten latents start again at zero, once
    learning rate    the step is taken in full and then shortened to a share of itself. That is
                     what a smaller learning rate does, for every update proportional to it (Adam,
                     AdamW, SGD); `param_groups` never hold another one, whatever raises
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from . import random_controls


@dataclass
class _Pending:
    """What the next step of one SAE still has to do, and what it may have to take back."""

    lr_scale: float = 1.0
    #: Parameter → latents (n,) int64 whose moments start again.
    resets: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    #: Parameter → its value before the step, while the step is shortened.
    before: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    #: Tensors with latents on axis 0, the latents rewritten in them, and what these were.
    rewritten: list[tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=list[tuple[Tensor, Tensor, Tensor]]
    )

    def rewrite(self, tensor: Tensor, latents: Tensor, values: Tensor | float) -> None:
        self.rewritten.append((tensor, latents, tensor[latents]))
        tensor[latents] = values


_saes: WeakKeyDictionary[Any, _Pending] = WeakKeyDictionary()


def watch(sae: Any) -> None:
    """Do for a training SAE what the module says, as long as it lives."""
    _pending(sae)


def scale_learning_rate(sae: Any, share: float) -> None:
    """Shorten this SAE's steps to a share of themselves, in [0, 1], until told otherwise."""
    _pending(sae).lr_scale = share


@torch.no_grad()
def rewrite_latents(sae: Any, name: str, latents: Tensor, values: Tensor | float) -> None:
    """Set latents of a parameter; their moments start at zero in the next step.

    name: a parameter in the SAE's `latent_axes`; latents: (n,) int64; values: a number, or
    (n, ...), one row per latent.
    """
    pending, parameter = _pending(sae), getattr(sae, name)
    pending.rewrite(_latents_first(sae, name, parameter), latents, values)
    if parameter.requires_grad:
        pending.resets[name] = latents


@torch.no_grad()
def take_back(sae: Any) -> None:
    """Undo what was rewritten since the last complete step, because this one is left out."""
    pending = _saes.get(sae)
    if pending is None:
        return
    for tensor, latents, values in reversed(pending.rewritten):
        tensor[latents] = values
    pending.rewritten.clear()
    pending.resets.clear()


@torch.no_grad()
def renormalize_(W_dec: Tensor) -> None:
    """Scale the rows of W_dec (d_sae, d_in) to norm 1, in place; zero rows stay zero."""
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    W_dec.div_(norms.clamp_min_(torch.finfo(W_dec.dtype).tiny))


@torch.no_grad()
def _before_step(optimizer: Optimizer, *_: Any) -> None:
    held = _held(optimizer)
    for sae, pending in _watched():
        # `before` is left over from a step that raised.
        if not (pending.resets or pending.before or pending.lr_scale != 1.0):
            continue
        for name, parameter in sae.named_parameters():
            if id(parameter) not in held:
                continue
            latents = pending.resets.pop(name, None)
            if latents is not None:
                for moment in optimizer.state.get(parameter, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                        pending.rewrite(_latents_first(sae, name, moment), latents, 0.0)
            pending.before.pop(name, None)
            if pending.lr_scale != 1.0:
                pending.before[name] = parameter.detach().clone()


@torch.no_grad()
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    held = _held(optimizer)
    for sae, pending in _watched():
        if pending.before or pending.rewritten:
            for name, parameter in sae.named_parameters():
                if id(parameter) not in held:
                    continue
                pending.rewritten.clear()
                # A step inside a step, as in an optimizer that wraps another, shortens it once.
                before = pending.before.pop(name, None)
                if before is not None:
                    parameter.copy_(before.lerp_(parameter, pending.lr_scale))
        if id(sae.W_dec) in held and sae.W_dec.requires_grad:
            if sae.cfg.decoder == "unit_norm":
                renormalize_(sae.W_dec)
            if sae.cfg.control == "soft_frozen":
                random_controls.pull_back_(sae.W_dec, sae.W_dec_start)


def _pending(sae: Any) -> _Pending:
    _install()
    return _saes.setdefault(sae, _Pending())


@cache
def _install() -> None:
    """Register the two global hooks, once per process."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _watched() -> Iterator[tuple[Any, _Pending]]:
    for reference in _saes.keyrefs():  # a list: another thread may add to the dictionary
        sae = reference()
        if sae is not None:
            yield sae, _saes[sae]


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _latents_first(sae: Any, name: str, tensor: Tensor) -> Tensor:
    """View a parameter, or what an optimizer keeps for it, with latents on axis 0."""
    return tensor.detach().movedim(sae.latent_axes[name], 0)
