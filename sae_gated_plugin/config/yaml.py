"""Reading and writing YAML, bounded, with overrides that remember where they came from."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, first_line


def yaml_text(value: Any) -> str:
    """`value` as YAML, its keys in their order."""
    return yaml.dump(value, Dumper=ExactDumper, sort_keys=False, allow_unicode=True)


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


def apply_overrides(override: str, mapping: dict[str, Any], origins: Origins) -> None:
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
