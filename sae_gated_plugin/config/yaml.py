"""Reading and writing YAML, bounded, with overrides that remember where they came from."""

from __future__ import annotations

import json
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


#: More than any configuration needs, and read in seconds: characters, values, levels of nesting.
MOST_TEXT, MOST_VALUES, MOST_LEVELS = 2**17, 10_000, 50


class _Loader(yaml.SafeLoader):
    """SafeLoader of plain values, without duplicate keys, aliases, tags and endless nesting.

    Without aliases ten lines cannot become ten billion values, and an override of one place
    cannot change another.
    """

    values = levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem="aliases (*x) and tags (!x) are not allowed; write the values out",
                problem_mark=event.start_mark,
            )
        self.values += 1
        self.levels += 1
        if self.values > MOST_VALUES or self.levels > MOST_LEVELS:
            raise yaml.YAMLError(
                f"it may hold {MOST_VALUES:,} values on {MOST_LEVELS} levels, and holds more."
            )
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key_node.value}' appears twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


class ExactDumper(yaml.SafeDumper):
    """SafeDumper that repeats instead of using aliases, and escapes line breaks beyond ASCII."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never use one."""
        return True

    def analyze_scalar(self, scalar: str) -> Any:
        """As in PyYAML, but only double quotes keep these line breaks from becoming spaces."""
        analysis = super().analyze_scalar(scalar)
        if re.search("[\x85\u2028\u2029]", scalar):
            analysis.allow_flow_plain = analysis.allow_block_plain = False
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis


class _Dumper(ExactDumper):
    """One whose quoting fits _Loader's reading."""


_PLAIN = {  # YAML 1.2; floats need no point, and digits may have underscores between them
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?(0|[1-9](_?[0-9])*)",
    "float": r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf)|\.(nan|NaN)",
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, _pattern in _PLAIN.items():
        _tag = f"tag:yaml.org,2002:{_name}"
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), None)


def _parse(text: str, origin: str) -> Any:
    if len(text) > MOST_TEXT:
        raise ConfigError(f"{origin} has {len(text):,} characters; {MOST_TEXT:,} are allowed.")
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud800" is half a character
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin} is not valid YAML{place}: {error.problem}.") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{origin} is not valid YAML: {reason}") from None
    except ValueError as error:  # Python's own, such as for a number of 5,000 digits
        raise ConfigError(f"{origin} is not valid YAML: {first_line(error)}") from None


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
