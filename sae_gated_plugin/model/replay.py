"""Forward passes with activations replaced, the layers before the hook point run once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from .hook_point import HookPoint


class Passes:
    """Forward passes over the same tokens that differ at a hook point and after it.

    Blocks before the hook point give the same outputs each time, so they run once. Whether a model
    allows that is found out on the first batch: its logits must come out the same to the bit.
    """

    def __init__(self, point: HookPoint):
        self.point = point
        self._blocks = point.blocks_before()
        self._outputs: dict[nn.Module, Any] = {}
        self._tried = False

    def first(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model as it is on tokens (batch, position); return what `HookPoint.run` does."""
        self._outputs.clear()
        with contextlib.ExitStack() as hooks:
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(self._keep).remove)
            logits, acts = self.point.run(tokens)
        if self._blocks and not self._tried:
            self._tried = True
            try:
                same = torch.equal(self.again(tokens), logits)
            except Exception:  # whatever such a model raises, its blocks cannot be left out
                same = False
            if not same:
                self._blocks = []
        return logits, acts

    def again(self, tokens: Tensor, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Run it on the tokens that `first` had, with `replace` at the hook point; logits."""
        with self._replaying():
            return self.point.run(tokens, replace)[0]

    def _keep(self, block: nn.Module, _: Any, output: Any) -> None:
        self._outputs[block] = output

    @contextlib.contextmanager
    def _replaying(self) -> Generator[None]:
        own = {block: vars(block).get("forward") for block in self._blocks}  # accelerate sets one
        for block in self._blocks:
            block.forward = _returning(self._outputs[block])
        try:
            yield
        finally:
            for block, forward in own.items():
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output  # pyright: ignore[reportUnknownLambdaType]
