"""Types and ranges of what a configuration gives, each refusal a sentence."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union

import torch
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from ..errors import ConfigError, UnknownArchitecture, nearest, unknown_name
from .yaml import Origins

# What SAELens annotates as plain text (or too narrowly), and rejects only when a run has begun.
_CHOICES: dict[str, Any] = {
    "dtype": Literal[tuple(DTYPE_MAP)],  # pyright: ignore[reportInvalidTypeForm]
    "lr_scheduler_name": Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"],
    "normalize_activations": Literal[
        "none",
        "expected_average_only_in",
        "constant_norm_rescale",
        "layer_norm",
        "covariance_whitening",
    ],
}
#: What is said of a number outside a range, whether it is inside, and the fields of that range.
# fmt: off
_RANGES: list[tuple[str, Callable[[float], bool], tuple[str, ...]]] = [
    ("be above zero, not {!r}", lambda number: number > 0, (
        "d_in", "d_sae", "k", "matryoshka_widths", "max_iterations", "decoder_init_norm",
        "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_tanh_scale", "lp_norm",
        "n_restart_cycles", "dead_feature_window", "context_size", "training_tokens",
        "train_batch_size_tokens", "store_batch_size_prompts", "eval_batch_size_prompts",
        "n_batches_in_buffer", "n_batches_for_norm_estimate", "lr", "training_samples",
        "batch_size", "eval_samples", "n_eval_batches", "feature_sampling_window",
        "wandb_log_frequency", "eval_every_n_wandb_logs",
    )),
    ("not be negative, as {!r} is", lambda number: number >= 0, (
        "l1_coefficient", "l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps",
        "pre_act_loss_coefficient", "aux_loss_coefficient", "auxk_coefficient", "resample_steps",
        "resample_warm_up_steps", "residual_threshold", "topk_threshold_lr", "adam_beta1",
        "adam_beta2", "lr_warm_up_steps", "lr_decay_steps", "lr_end", "dead_feature_threshold",
        "activations_mixing_fraction", "exclude_special_tokens", "sequence_separator_token",
        "n_checkpoints", "value",  # of a constant magnitude, in a toy
    )),
    ("not be above one, as {!r} is", lambda number: number <= 1, (
        "activations_mixing_fraction", "dead_feature_threshold", "topk_threshold_lr",
    )),
    ("be below one, not {!r}", lambda number: number < 1, ("adam_beta1", "adam_beta2")),
]
# fmt: on
_DEVICES = ("device", "llm_device", "act_store_device")


def check_sae(sae: dict[str, Any], origins: Origins) -> tuple[type[Any], dict[str, Any]]:
    """Take `architecture` out of a `sae` section; return its training config's class and fields.

    Raises ConfigError (UnknownArchitecture for that one name).
    """
    architecture = sae.pop("architecture", None)
    if architecture is None:
        raise ConfigError(f"'sae.architecture' is missing in {origins.default}.")
    if architecture not in list(SAE_TRAINING_CLASS_REGISTRY):
        sentence = unknown_name("architecture", str(architecture), SAE_TRAINING_CLASS_REGISTRY)
        raise UnknownArchitecture(f"{sentence} (In {origins.of('sae.architecture')}.)")
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    owner = f" of architecture '{architecture}'"
    aliases = ("architecture",)
    checked = check_config(config_class, sae, "sae.", origins, owner=owner, aliases=aliases)
    for name in ("k", "target_l0"):
        if (checked.get(name) or 0) > checked["d_sae"]:
            raise ConfigError(
                f"'sae.{name}' in {origins.of(f'sae.{name}')} is {checked[name]}, more than d_sae "
                f"= {checked['d_sae']}."
            )
    return config_class, checked


def config_section(
    mapping: dict[str, Any], name: str, origins: Origins, prefix: str = ""
) -> dict[str, Any]:
    """Take a mapping out of the mapping; empty where there is none."""
    value, key = mapping.pop(name, None), f"{prefix}{name}"
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"'{key}' in {origins.of(key)} must be a mapping, not {value!r}.")
    return typing.cast("dict[str, Any]", value) or {}


def check_config(
    config_class: type[Any],
    values: dict[str, Any],
    prefix: str,
    origins: Origins,
    *,
    owner: str = "",
    sections: Iterable[str] = (),
    aliases: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the values as the dataclass wants them, or raise ConfigError.

    sections, aliases: keys that are valid at this level but are read elsewhere.
    """
    known_hints = field_types(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.init}
    fields.pop("metadata", None)  # filled by SAELens when it runs
    known = [f"{prefix}{name}" for name in (*fields, *aliases)]
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in fields or name in sections:
            raise ConfigError(
                f"Unknown key '{key}'{owner} in {origins.of(key)}.{nearest(key, known)}"
            )
        where = f"'{key}' in {origins.of(key)}"
        checked[name] = convert_value(known_hints[name], value, where)
        require_range(name, checked[name], where)
        if name in _DEVICES:
            _require_device(checked[name], where)
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in checked and name not in sections:
            raise ConfigError(f"'{prefix}{name}'{owner} is missing in {origins.default}.")
    return checked


def field_types(config_class: type[Any]) -> dict[str, Any]:
    """Return what each field of a config class may hold."""
    return {**typing.get_type_hints(config_class), **_CHOICES}


def require_range(name: str, value: Any, where: str) -> None:
    """Raise ConfigError for a number, or one in a list, that the field cannot mean."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        for words, is_inside, names in _RANGES:
            if name in names and not is_inside(number):
                raise ConfigError(f"{where} must {words.format(number)}.")
        if isinstance(number, int) and abs(number) >= 2**63:
            raise ConfigError(f"{where} must be a whole number of at most 64 bits.")


def _require_device(value: str | None, where: str) -> None:
    try:
        torch.device(value if value not in (None, "with_model") else "cpu")
    except RuntimeError:
        sentence = f"{where} must be a device of PyTorch, such as 'cpu' or 'cuda:0', not {value!r}."
        raise ConfigError(sentence) from None


def convert_value(hint: Any, value: Any, key: str) -> Any:
    """Return the value in the hinted type: lists become tuples, and nothing else changes type.

    key: names the value in the sentence of the ConfigError that what does not fit raises.
    """
    try:
        adapter = TypeAdapter[Any](hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    except PydanticUserError:
        return value  # a type of somebody's own: its config class must judge
    if isinstance(value, float) and value.is_integer() and hint in (int, int | None):
        value = int(value)  # training_tokens: 2e6
    try:
        # What JSON or UTF-8 cannot hold, a run's files could not either.
        text = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        if isinstance(value, dict):  # a model's own arguments: JSON would make text of their keys
            return adapter.validate_python(value)
        return adapter.validate_json(text)
    except (ValidationError, TypeError, ValueError, RecursionError):
        raise ConfigError(f"{key} must be {_describe(hint)}, not {value!r:.80}.") from None


#: Types in words: one such value, and many.
_TYPES = {
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    bool: ("true or false", "true or false values"),
    type(None): ("null", "nulls"),
    dict: ("a mapping", "mappings"),
}


def _describe(hint: Any, many: bool = False) -> str:
    """Say a type hint in words. many: as in "a list of whole numbers"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        choices = ", ".join(repr(choice) for choice in args)
        return f"values out of {choices}" if many else f"one of {choices}"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg, many) for arg in args)
    if origin in (list, tuple):
        return ("lists of " if many else "a list of ") + _describe(args[0], many=True)
    words = _TYPES.get(origin or hint)
    return words[many] if words else str(hint)
