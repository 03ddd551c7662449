"""YAML and dotted overrides in, SAELens's own runner configuration out, strictly checked.

A configuration is SAELens's: the keys are the fields of `LanguageModelSAERunnerConfig`; `sae` holds
`architecture` and the fields of that architecture's training config; `logger` holds the fields of
`LoggingConfig`. Whatever is not such a field is an error, for a misspelt key that is silently
ignored costs a training run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union

import torch
import yaml
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from .errors import ConfigError, UnknownArchitecture, nearest, unknown_name
from .hook_points import first_line

#: As model_name and dataset_path: the language model and the text that the package carries.
QUICKSTART = "quickstart"


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration.

    mapping: what the file and the overrides said, merged, and nothing else; becomes `run.yaml`.
    runner: SAELens's configuration built from it.
    """

    mapping: dict[str, Any]
    runner: LanguageModelSAERunnerConfig[Any]

    def with_output(self, folder: str | Path) -> RunConfig:
        """Return a copy whose results go to `folder`, checkpoints to `folder/checkpoints`.

        SAELens appends a random id to `checkpoint_path` while it builds a configuration; a run's
        folder is already its own, so here the id is left out.
        """
        runner = copy.deepcopy(self.runner)
        runner.output_path = str(folder)
        runner.checkpoint_path = str(Path(folder) / "checkpoints")
        return RunConfig({**copy.deepcopy(self.mapping), "output_path": str(folder)}, runner)

    def to_yaml(self) -> str:
        """Return the merged mapping as YAML that `load` reads back to an equal configuration."""
        return to_yaml(self.mapping)


def packaged(key: str) -> str:
    """Return where the package carries its `model_name` or its `dataset_path`."""
    folder = {"model_name": "model", "dataset_path": "text"}[key]
    return str(resources.files("sae_gated_plugin") / QUICKSTART / folder)


def unpackaged(path: Any) -> Any:
    """Return QUICKSTART for a path that is the package's own, anything else as it is."""
    return QUICKSTART if path in (packaged("model_name"), packaged("dataset_path")) else path


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration, apply the overrides, check every key and value, build SAELens's config.

    source: a YAML file, or an equal mapping. overrides: `dotted.key=value`, values in YAML.
    Raises ConfigError (UnknownArchitecture for that one name) with a sentence that names the key,
    where it came from, and the nearest valid one.
    """
    mapping, origins = read(source, overrides)
    built = copy.deepcopy(mapping)
    for key in ("model_name", "dataset_path"):
        if built.get(key) == QUICKSTART:
            built[key] = packaged(key)
    return RunConfig(mapping, _build(built, origins))


def read(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], Origins]:
    """Return a copy with the overrides applied, unchecked, and where its keys come from.

    Raises ConfigError for a file or an override that does not parse.
    """
    if isinstance(source, Mapping):
        mapping, origins = copy.deepcopy(dict(source)), Origins("the configuration")
    else:
        mapping, origins = read_yaml(source), Origins(f"'{source}'")
    for override in overrides:
        apply(override, mapping, origins)
    return mapping, origins


def to_yaml(mapping: Mapping[str, Any]) -> str:
    """Return YAML that `read_yaml` reads back to an equal mapping."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping, without duplicate keys.

    Raises ConfigError with line and column where the text does not parse.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"Configuration file '{path}' does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration file '{path}' cannot be read: {error}") from None
    value = _parse(text, f"'{path}'")
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"'{path}' must hold a mapping of keys to values; it holds {found}.")
    return typing.cast("dict[str, Any]", value)


class Origins:
    """Where each dotted key came from: the file, or the override that set it last."""

    def __init__(self, default: str):
        self.default = default
        self.overrides: dict[str, str] = {}

    def of(self, key: str) -> str:
        """An override's text for the key itself, one below it or one above it."""
        for known, text in reversed(self.overrides.items()):
            if known == key or known.startswith(f"{key}.") or key.startswith(f"{known}."):
                return f"the override '{text}'"
        return self.default


# --- YAML: as in version 1.2, `3e-4` is a number, `on` is a word, and a date is text --------------


#: More than any configuration needs, and read in seconds: characters, values with every alias
#: written out, levels of nesting.
MOST_TEXT, MOST_VALUES, MOST_LEVELS = 2**17, 10_000, 50


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, and aliases that stand for more than they should."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        values, levels = (0, 0) if node is None else _extent(node, {})
        if values > MOST_VALUES or levels > MOST_LEVELS:
            raise yaml.YAMLError(
                f"it may hold {MOST_VALUES:,} values on {MOST_LEVELS} levels, with its aliases "
                "written out, and holds more."
            )
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key}' appears twice", problem_mark=key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def _extent(node: Any, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values, on how many levels, a node is; no end of them where it contains itself."""
    if id(node) not in known:
        known[id(node)] = (math.inf, math.inf)
        inner = [_extent(child, known) for child in _children(node)]
        values, levels = zip(*inner) if inner else ((), ())
        known[id(node)] = 1 + sum(values), 1 + max(levels, default=0)
    return known[id(node)]


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


class ExactDumper(yaml.SafeDumper):
    """SafeDumper that escapes the line breaks beyond ASCII, which are read back as spaces."""

    def analyze_scalar(self, scalar: str) -> Any:
        """As in PyYAML; only double quotes escape."""
        analysis = super().analyze_scalar(scalar)
        if re.search("[\x85\u2028\u2029]", scalar):
            analysis.allow_flow_plain = analysis.allow_block_plain = False
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis


class _Dumper(ExactDumper):
    """One whose quoting fits _Loader's reading."""


_WORDS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
    ("int", r"[-+]?(0|[1-9](_?[0-9])*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _WORDS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first)
        )


def _parse(text: str, origin: str) -> Any:
    if len(text) > MOST_TEXT:
        raise ConfigError(f"{origin} has {len(text):,} characters; {MOST_TEXT:,} are allowed.")
    try:
        return _written_out(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin} is not valid YAML{place}: {error.problem}.") from None
    except RecursionError:
        raise ConfigError(f"{origin} is not valid YAML: it is nested too deeply.") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{origin} is not valid YAML: {reason}") from None
    except Exception as error:  # a tag's value that is none: `!!bool maybe` is a KeyError
        raise ConfigError(f"{origin} is not valid YAML: {first_line(error)}") from None


def _written_out(value: Any) -> Any:
    """A copy in which no two places share a mapping: an override of one must not change another."""
    if isinstance(value, dict):
        items = typing.cast("dict[Any, Any]", value).items()
        return {_written_out(key): _written_out(inner) for key, inner in items}
    if isinstance(value, list | tuple):
        return [_written_out(inner) for inner in typing.cast("list[Any]", value)]
    if isinstance(value, str):
        value.encode()  # "\\ud800" is half a character, which no file can hold
    return value


def apply(override: str, mapping: dict[str, Any], origins: Origins) -> None:
    """Set one `dotted.key=value` in the mapping."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MOST_LEVELS:
        raise ConfigError(f"Override '{override}' is not of the form key=value.")
    value = _parse(text, f"The value of override '{override}'")
    inner = mapping
    for depth, part in enumerate(parts[:-1]):
        child = inner.setdefault(part, {})
        if child is None:
            child = inner[part] = {}
        if not isinstance(child, dict):
            above = ".".join(parts[: depth + 1])
            raise ConfigError(f"Override '{override}': '{above}' is a single value, not a mapping.")
        inner = typing.cast("dict[str, Any]", child)
    inner[parts[-1]] = value
    origins.overrides.pop(".".join(parts), None)
    origins.overrides[".".join(parts)] = override


# --- checking -------------------------------------------------------------------------------------

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
_POSITIVE = [
    "d_in",
    "d_sae",
    "k",
    "matryoshka_widths",
    "max_iterations",
    "decoder_init_norm",
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
    "jumprelu_tanh_scale",
    "lp_norm",
    "n_restart_cycles",
    "dead_feature_window",
    "context_size",
    "training_tokens",
    "train_batch_size_tokens",
    "store_batch_size_prompts",
    "eval_batch_size_prompts",
    "n_batches_in_buffer",
    "n_batches_for_norm_estimate",
    "lr",
    "training_samples",
    "batch_size",
    "eval_samples",
    "n_eval_batches",
    "feature_sampling_window",
    "wandb_log_frequency",
    "eval_every_n_wandb_logs",
]
_NOT_NEGATIVE = [
    "l1_coefficient",
    "l1_warm_up_steps",
    "l0_coefficient",
    "l0_warm_up_steps",
    "pre_act_loss_coefficient",
    "aux_loss_coefficient",
    "auxk_coefficient",
    "resample_steps",
    "resample_warm_up_steps",
    "residual_threshold",
    "topk_threshold_lr",
    "adam_beta1",
    "adam_beta2",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "lr_end",
    "dead_feature_threshold",
    "activations_mixing_fraction",
    "exclude_special_tokens",
    "sequence_separator_token",
    "n_checkpoints",
    "value",  # of a constant magnitude, in a toy
]
_AT_MOST_ONE = ["activations_mixing_fraction", "dead_feature_threshold", "topk_threshold_lr"]
_BELOW_ONE = ["adam_beta1", "adam_beta2"]
_DEVICES = ["device", "llm_device", "act_store_device"]


def _build(mapping: dict[str, Any], origins: Origins) -> LanguageModelSAERunnerConfig[Any]:
    sae = section(mapping, "sae", origins)
    logger = section(mapping, "logger", origins)
    if not sae:
        raise ConfigError(f"{origins.default} has no 'sae' section; it names the architecture.")
    config_class, sae = check_sae(sae, origins)
    top = check(LanguageModelSAERunnerConfig, mapping, "", origins, sections=("sae", "logger"))
    logger = check(LoggingConfig, logger, "logger.", origins)
    if not top.get("dataset_path"):
        raise ConfigError(f"'dataset_path' is missing in {origins.default}.")
    try:
        runner = LanguageModelSAERunnerConfig(
            sae=config_class(**sae), logger=LoggingConfig(**logger), **top
        )
        positions = len(range(runner.context_size)[slice(*runner.seqpos_slice)])
    except Exception as error:  # SAELens's own checks, or those of somebody's architecture
        reason = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ConfigError(f"{origins.default} cannot be used: {reason}") from error
    if runner.n_batches_in_buffer * positions < runner.train_batch_size_tokens:
        raise ConfigError(  # SAELens counts one sequence per batch here, and finds out in training
            f"A buffer of n_batches_in_buffer × positions = {runner.n_batches_in_buffer} × "
            f"{positions} is smaller than train_batch_size_tokens = "
            f"{runner.train_batch_size_tokens}; raise n_batches_in_buffer."
        )
    return runner


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
    checked = check(config_class, sae, "sae.", origins, owner=owner, aliases=aliases)
    if checked.get("k", 0) > checked["d_sae"]:
        raise ConfigError(
            f"'sae.k' in {origins.of('sae.k')} is {checked['k']}, more than d_sae = "
            f"{checked['d_sae']}."
        )
    return config_class, checked


def section(
    mapping: dict[str, Any], name: str, origins: Origins, prefix: str = ""
) -> dict[str, Any]:
    """Take a mapping out of the mapping; empty where there is none."""
    value, key = mapping.pop(name, None), f"{prefix}{name}"
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"'{key}' in {origins.of(key)} must be a mapping, not {value!r}.")
    return typing.cast("dict[str, Any]", value) or {}


def check(
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
    known_hints = hints(config_class)
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
        checked[name] = convert(known_hints[name], value, where)
        require_range(name, checked[name], where)
        if name in _DEVICES:
            _require_device(checked[name], where)
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in checked and name not in sections:
            raise ConfigError(f"'{prefix}{name}'{owner} is missing in {origins.default}.")
    return checked


def hints(config_class: type[Any]) -> dict[str, Any]:
    """Return what each field of a config class may hold."""
    return {**typing.get_type_hints(config_class), **_CHOICES}


def require_range(name: str, value: Any, where: str) -> None:
    """Raise ConfigError for a number, or one in a list, that the field cannot mean."""
    numbers = [
        number
        for number in (value if isinstance(value, list | tuple) else [value])
        if isinstance(number, int | float) and not isinstance(number, bool)
    ]
    for number in numbers:
        if name in _POSITIVE and number <= 0:
            raise ConfigError(f"{where} must be above zero, not {number!r}.")
        if name in _NOT_NEGATIVE and number < 0:
            raise ConfigError(f"{where} must not be negative, as {number!r} is.")
        if name in _AT_MOST_ONE and number > 1:
            raise ConfigError(f"{where} must not be above one, as {number!r} is.")
        if name in _BELOW_ONE and number >= 1:
            raise ConfigError(f"{where} must be below one, not {number!r}.")
        if isinstance(number, int) and abs(number) >= 2**63:
            raise ConfigError(f"{where} must be a whole number of at most 64 bits.")


def _require_device(value: str | None, where: str) -> None:
    try:
        torch.device(value if value not in (None, "with_model") else "cpu")
    except RuntimeError:
        sentence = f"{where} must be a device of PyTorch, such as 'cpu' or 'cuda:0', not {value!r}."
        raise ConfigError(sentence) from None


def convert(hint: Any, value: Any, key: str) -> Any:
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
