"""What the next step depends on and SAELens's checkpoints leave out, in parts with a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..saelens_internals import set_coefficient

State = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A part of a training: what its state is now, and what goes on from one."""

    state_dict: Callable[[], State]
    load_state_dict: Callable[[State], Any]


class Parts:
    """The parts of a training by name, saved together, each tensor as `name.key`.

    state: what a checkpoint has of them; each part takes up its own when it is added.
    """

    def __init__(self, state: State):
        self._parts: dict[str, Any] = {}
        self._state = state

    def add(self, name: str, part: Any) -> None:
        """Add anything with `state_dict` and `load_state_dict`."""
        keys = [key for key in self._state if key.startswith(f"{name}.")]
        if keys:
            part.load_state_dict({k.removeprefix(f"{name}."): self._state.pop(k) for k in keys})
        self._parts[name] = part

    def state_dict(self) -> State:
        """The state of all parts."""
        return {
            f"{name}.{key}": value
            for name, part in self._parts.items()
            for key, value in part.state_dict().items()
        }


def _generators() -> State:
    cuda = {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_generators(state: State) -> None:
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


#: torch's own, of the CPU and of each GPU.
GENERATORS = Part(_generators, _set_generators)


def coefficients(trainer: Any) -> Part:
    """The warm-ups of a trainer's coefficients."""

    def values() -> State:
        found = trainer.get_coefficients()
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}

    def set_values(state: State) -> None:
        for name, value in state.items():
            set_coefficient(trainer, name, float(value))

    return Part(values, set_values)


def unrounded(sae: Any) -> Part:
    """Those tensors of an SAE that SAELens rounds on saving, such as exp(log_threshold)."""

    def tensors() -> State:
        saved, state = sae.state_dict(), sae.state_dict()
        sae.process_state_dict_for_saving(saved)
        return {
            name: tensor.contiguous()
            for name, tensor in state.items()
            if name not in saved or not torch.equal(saved[name], tensor)
        }

    return Part(tensors, lambda state: sae.load_state_dict(state, strict=False))
