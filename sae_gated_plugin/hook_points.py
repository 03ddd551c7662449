"""One hook point of a language model: read its activations, run the model with others in place."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.load_model import load_model
from torch import Tensor, nn

from .errors import ConfigError, one_line


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the name of an error and the first line of its text, for use inside a sentence."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a stranger's error may fail even at this
        lines = []
    text = one_line(lines[0]) if lines else ""
    text = text if len(text) <= limit else text[:limit] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def require_local(what: str, name: str) -> None:
    """Raise ConfigError for a name that can only be a path of this machine and is not there."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise ConfigError(f"{what} '{name}' does not exist.")


@dataclass(frozen=True)
class HookPoint:
    """A place in a loaded model where an SAE reads, and where its output can be put back.

    model: a SAELens-wrapped model (HookedTransformer, HookedMamba or a Hugging Face proxy).
    name: the hook point in that model's naming.
    head_index: the attention head to use; None takes every head, flattened into one vector.
    """

    model: Any
    name: str
    head_index: int | None = None

    @classmethod
    def load(
        cls,
        model_name: str,
        model_class_name: str,
        name: str,
        head_index: int | None = None,
        *,
        device: str | torch.device = "cpu",
        from_pretrained_kwargs: dict[str, Any] | None = None,
    ) -> HookPoint:
        """Load a model as SAELens does, instrumented at one hook point.

        Raises ConfigError when the model cannot be loaded or has no such hook point.
        """
        require_local("model_name", model_name)

        def load(hook_names: list[str] | None) -> Any:
            return load_model(
                model_class_name,
                model_name,
                device=device,
                model_from_pretrained_kwargs=dict(from_pretrained_kwargs or {}),
                hook_names=hook_names,
            )

        try:
            try:
                model = load([name])
            except ValueError as error:
                if "hook_names not found" not in str(error):
                    raise
                model = load(None)  # with every hook point, so that the nearest can be named
        except Exception as error:
            raise ConfigError(
                f"Model '{model_name}' ({model_class_name}) cannot be loaded: {first_line(error)}"
            ) from error
        point = cls(model, name, head_index)
        point.require_exists(model_name)
        return point

    @property
    def device(self) -> torch.device:
        """Where the model wants its tokens."""
        return next(self.model.parameters()).device

    def require_exists(self, model_name: str) -> None:
        """Raise ConfigError, naming the nearest hook points, if the model lacks this one."""
        known: list[str] = list(self.model.hook_dict)
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=3, cutoff=0.4) or known[:3]
            raise ConfigError(
                f"Model '{model_name}' has no hook point '{self.name}'; "
                f"the nearest are {', '.join(map(repr, near))}."
            )

    def sizes(self) -> tuple[int, int]:
        """Run the model on two tokens; return the hook point's width and the vocabulary's size."""
        logits, acts = self.run(torch.zeros(1, 2, dtype=torch.long))
        return acts.shape[-1], logits.shape[-1]

    def require_width(self, d_in: int) -> None:
        """Raise ConfigError if activations here do not have `d_in` numbers."""
        width, _ = self.sizes()
        if width != d_in:
            raise ConfigError(
                f"d_in is {d_in}, but hook point '{self.name}' is {width} wide; "
                f"set sae.d_in={width} or choose another hook point."
            )

    @torch.no_grad()
    def run(
        self, tokens: Tensor, replace: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the model; return its logits and the activations found at the hook point.

        tokens: (batch, position). replace: maps those activations, (batch, position, d_in), to the
        ones the model goes on with. Returns (batch, position, vocabulary), (batch, position, d_in).
        """
        found: list[Tensor] = []

        def at_hook(acts: Tensor, hook: Any) -> Tensor | None:
            found.append(self._select(acts))
            return None if replace is None else self._put(acts, replace(found[-1]))

        logits = self.model.run_with_hooks(
            tokens.to(self.device), return_type="logits", fwd_hooks=[(self.name, at_hook)]
        )
        if not found:
            raise ConfigError(f"Hook point '{self.name}' gives no activations in a forward pass.")
        return logits, found[0]

    def _select(self, acts: Tensor) -> Tensor:
        if self.head_index is None:
            return acts.flatten(2)
        if acts.ndim < 4 or not -acts.shape[2] <= self.head_index < acts.shape[2]:
            heads = acts.shape[2] if acts.ndim > 3 else 0
            raise ConfigError(
                f"hook_head_index is {self.head_index}, but '{self.name}' has {heads} heads."
            )
        return acts[:, :, self.head_index]

    def _put(self, acts: Tensor, new: Tensor) -> Tensor:
        new = new.to(acts)
        if self.head_index is None:
            return new.reshape(acts.shape)
        acts = acts.clone()
        acts[:, :, self.head_index] = new
        return acts

    def blocks_before(self) -> list[nn.Module]:
        """The model's blocks that are done when this hook point is reached; [] if none are known.

        `model.layers.9` and `blocks.9.hook_resid_post` lie in a list of blocks at index 9.
        """
        parts = self.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        path = "." + ".".join(parts[:number])
        lists = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and f".{name}".endswith(path)
        ]
        return list(lists[0])[: int(parts[number])] if number and len(lists) == 1 else []


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
        handles = [block.register_forward_hook(self._keep) for block in self._blocks]
        try:
            logits, acts = self.point.run(tokens)
        finally:
            for handle in handles:
                handle.remove()
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
