"""One hook point of a language model: read its activations, run the model with others in place."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.load_model import load_model
from torch import Tensor, nn

from ..config.run import QUICKSTART, packaged
from ..errors import ConfigError, first_line
from ..files import require_local


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
        if model_name == QUICKSTART:  # as a published SAE's metadata has it
            model_name = packaged("model_name")

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
