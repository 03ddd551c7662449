"""One hook point of a language model: read its activations, run the model with others in place.

Shapes: B sequences, P positions, D width of the hook point, V vocabulary.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.load_model import load_model
from torch import Tensor, nn

from ..config.run import QUICKSTART, packaged
from ..errors import ConfigError, first_line
from ..files import logger, require_local

#: Modules of Hugging Face's models, and what TransformerLens's bridge calls their outputs.
_LAYER = re.compile(r"(?:model|transformer|gpt_neox|model\.decoder)\.(?:layers|h)\.(\d+)(\.\w+)?")
_NUMBER = re.compile(r"\d+")
_PARTS = {None: "", ".mlp": ".mlp", ".self_attn": ".attn", ".attn": ".attn", ".attention": ".attn"}


def _nearest(name: str, known: Sequence[str]) -> Sequence[str]:
    """Three names, the nearest first: by spelling, or by layer for another library's name."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if name.split(".")[0] in {other.split(".")[0] for other in known}:
        return close or known[:3]
    numbers = {other: int(found[0]) for other in (name, *known) if (found := _NUMBER.search(other))}
    layers = [other for other in known if name in numbers and other in numbers]
    layers.sort(key=lambda other: (abs(numbers[other] - numbers[name]), len(other)))
    return layers[:3] or close or known[:3]


def bridge_name(hook_name: str) -> str | None:
    """What SAELens's SAETransformerBridge calls a hook point; None where it has no such name.

    SAELens trains on modules of a Hugging Face model by their own names, which the bridge skips.
    """
    if hook_name.startswith("blocks."):
        return hook_name
    found = _LAYER.fullmatch(hook_name)
    if found is None or found[2] not in _PARTS:
        return None
    return f"blocks.{found[1]}{_PARTS[found[2]]}.hook_out"


def require_devices(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """`require_device` for each of a configuration: only here, for a sweep may be read elsewhere
    than its tasks run.
    """
    for key in ("device", "llm_device", "act_store_device"):
        require_device(getattr(cfg, key) or cfg.device, f"'{key}': ")


def require_device(device: str | torch.device, begin: str = "") -> None:
    """Raise ConfigError for a device that PyTorch cannot compute on here. begin: of a sentence."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            found.append("mps")
        raise ConfigError(
            f"{begin}Device '{device}' cannot be used here: "
            f"{str(error).splitlines()[0].rstrip('.')}. There is {', '.join(found)}."
        ) from None


@dataclass(frozen=True)
class HookPoint:
    """A place in a loaded model where an SAE reads, and where its output can be put back."""

    model: Any
    """A SAELens-wrapped model: HookedTransformer, HookedMamba or a Hugging Face proxy."""
    name: str
    head_index: int | None = None
    """The attention head to use; None takes every head, flattened into one vector."""

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
        """Load a model as SAELens does, instrumented at one hook point."""
        require_local(
            "model_name",
            model_name,
            "Give a folder that save_pretrained has written, or a name on the Hub (owner/name).",
        )
        if model_name == QUICKSTART:  # as a published SAE's metadata has it
            model_name = packaged("model_name")
        require_device(device)
        options = dict(from_pretrained_kwargs or {})
        load = partial(load_model, model_class_name, model_name, device, options)
        try:
            try:
                model = load(hook_names=[name])
            except ValueError as error:
                if "hook_names not found" not in str(error):
                    raise
                model = load()  # with every hook point, so that the nearest can be named
        except Exception as error:
            reason = first_line(error)
            if "tokenizer" in reason or "model_proto" in reason:  # sentencepiece's argument
                reason += " SAELens needs the model's tokenizer, in the same place as its weights."
            raise ConfigError(
                f"Model '{model_name}' ({model_class_name}) cannot be loaded: {reason}"
            ) from error
        point = cls(model, name, head_index)
        point.require_exists(model_name)
        return point

    @classmethod
    def for_training(cls, cfg: LanguageModelSAERunnerConfig[Any]) -> HookPoint:
        """Load the model of a configuration, and see whether the rest of it fits."""
        require_devices(cfg)
        point = cls.load(
            cfg.model_name,
            cfg.model_class_name,
            cfg.hook_name,
            cfg.hook_head_index,
            device=cfg.llm_device or cfg.device,
            from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
        )
        point.require_width(cfg.sae.d_in)
        point.warn_of_text(cfg.context_size, cfg.prepend_bos)
        return point

    @property
    def device(self) -> torch.device:
        """Where the model wants its tokens."""
        return next(self.model.parameters()).device

    def require_exists(self, model_name: str) -> None:
        """Raise ConfigError, naming the nearest hook points, if the model lacks this one."""
        known: list[str] = list(self.model.hook_dict)
        if self.name not in known:
            near = _nearest(self.name, known)
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

    def positions(self) -> int | None:
        """How many positions the model was made for, where it says so."""
        config = getattr(self.model, "cfg", None) or getattr(self.model.model, "config", None)
        config = getattr(config, "text_config", config)  # of a model that sees images, too
        return getattr(config, "n_ctx", None) or getattr(config, "max_position_embeddings", None)

    def warn_of_text(self, context_size: int | None, prepend_bos: bool | None) -> None:
        """Warn of sequences that the model was not made for."""
        positions = self.positions()
        if positions and (context_size or 0) > positions:
            logger.warning(
                "context_size is %d, but the model has %d positions: beyond them its activations "
                "are not those of its normal use, if it runs at all.",
                context_size,
                positions,
            )
        tokenizer = getattr(self.model, "tokenizer", None)
        if prepend_bos and tokenizer is not None and tokenizer.bos_token_id is None:
            logger.warning(
                "prepend_bos is true, but the model's tokenizer has no BOS token: sequences begin "
                "without one. Set prepend_bos=false to say so."
            )

    @torch.no_grad()
    def run(
        self, tokens_BP: Tensor, replace: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the model; return logits_BPV and the activations at the hook point, acts_BPD.

        replace: maps those activations to the ones that the model goes on with.
        """
        found: list[Tensor] = []

        def at_hook(acts: Tensor, hook: Any) -> Tensor | None:
            found.append(self._select(acts))
            return None if replace is None else self._put(acts, replace(found[-1]))

        logits = self.model.run_with_hooks(
            tokens_BP.to(self.device), return_type="logits", fwd_hooks=[(self.name, at_hook)]
        )
        if not found:
            raise ConfigError(f"Hook point '{self.name}' gives no activations in a forward pass.")
        return logits, found[0]

    @torch.no_grad()
    def read(self, tokens_BP: Tensor) -> Tensor:
        """The activations at the hook point, acts_BPD; what comes after it is not computed."""

        def stop(acts: Tensor, hook: Any) -> None:
            raise _Reached(self._select(acts))

        try:
            self.model.run_with_hooks(
                tokens_BP.to(self.device), return_type="logits", fwd_hooks=[(self.name, stop)]
            )
        except _Reached as reached:
            return reached.args[0]
        raise ConfigError(f"Hook point '{self.name}' gives no activations in a forward pass.")

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


class _Reached(Exception):
    """Carries the activations out of a forward pass whose rest nobody wants."""
