"""From a sweep's file to its points."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sae_lens import LanguageModelSAERunnerConfig

from ..config.check import config_section
from ..config.grid import LONGEST_NAME, known_fields, require_label
from ..config.run import RunConfig, load_config
from ..config.yaml import Origins, read_yaml
from ..errors import ConfigError, nearest

#: More is a slip of the hand: lists multiply.
MOST_POINTS = 10_000

_KEYS = ("seeds", "eval_tokens", "curves")


@dataclass(frozen=True)
class Point:
    """One SAE of a sweep: its folder's name, its curve's label, what was varied, its run."""

    name: str
    label: str
    seed: int
    settings: dict[str, Any]
    config: RunConfig

    def about(self) -> dict[str, Any]:
        """What a report wants to know of it beside its results."""
        return {"label": self.label, "seed": self.seed, "settings": self.settings}


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. eval_tokens: held-out tokens of text per SAE, None for a run's own."""

    mapping: dict[str, Any]
    points: list[Point]
    eval_tokens: int | None


def load_sweep(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep, apply the overrides to what its points share, check every point.

    Raises ConfigError for an empty sweep, an unknown key, a point that is no valid run, two points
    that are the same.
    """
    mapping = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else read_yaml(source)
    whole = copy.deepcopy(mapping)
    section = mapping.pop("sweep", None)
    if not isinstance(section, dict):
        raise ConfigError("A sweep needs a 'sweep' section with 'curves'; there is none.")
    section = cast("dict[str, Any]", section)
    config_section(dict(mapping), "sae", Origins("the sweep"))
    for key in section:
        if key not in _KEYS:
            raise ConfigError(f"Unknown key 'sweep.{key}'.{nearest(key, _KEYS)}")
    curves = section.get("curves") or []
    if not isinstance(curves, list) or not all(isinstance(curve, dict) for curve in curves):
        raise ConfigError("'sweep.curves' must be a list of mappings.")
    shared = _seeds(section.get("seeds", [mapping.get("seed", 0)]), "sweep.seeds")
    seeds = [
        _seeds(curve.get("seeds", shared), f"sweep.curves[{index}].seeds")
        for index, curve in enumerate(curves)
    ]
    eval_tokens = section.get("eval_tokens")
    if eval_tokens is not None and (type(eval_tokens) is not int or eval_tokens < 2):
        raise ConfigError(
            f"'sweep.eval_tokens' must be a whole number above 1, not {eval_tokens!r:.80}."
        )
    number = sum(
        math.prod(map(len, _alternatives(curve).values())) * len(own)
        for curve, own in zip(curves, seeds)
    )
    if number > MOST_POINTS:
        raise ConfigError(f"The sweep has {number:,} points; at most {MOST_POINTS:,} are allowed.")
    points = [
        point
        for curve, own in zip(curves, seeds)
        for point in _curve(curve, mapping, own, list(overrides))
    ]
    if not points:
        raise ConfigError("The sweep is empty: 'sweep.curves' and 'sweep.seeds' give no point.")
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"Two points of the sweep are the same, or have labels that differ in symbols only: "
            f"{', '.join(twice)}."
        )
    return Sweep(whole, points, eval_tokens)


def _curve(
    curve: dict[str, Any], shared: dict[str, Any], seeds: list[int], overrides: list[str]
) -> Iterator[Point]:
    """The points of one curve: all combinations of what is given as a list."""
    architecture = curve.get("architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ConfigError(f"The curve {curve!r:.200} names no 'architecture'.")
    label = require_label(curve.get("label", architecture))
    runner_fields = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)}
    alternatives = _alternatives(curve)
    if "seed" in alternatives:
        raise ConfigError(f"The curve '{label}' gives 'seed'; a curve's seeds are a list, 'seeds'.")
    varied = [name for name, several in alternatives.items() if len(several) > 1]
    for values, seed in itertools.product(itertools.product(*alternatives.values()), seeds):
        chosen = dict(zip(alternatives, values))
        mapping = copy.deepcopy(shared)
        mapping["seed"] = seed
        sae = mapping["sae"] = known_fields(mapping.get("sae") or {}, architecture)
        sae["architecture"] = architecture
        for name, value in chosen.items():
            (mapping if name in runner_fields else sae)[name] = value
        moving = {name: chosen[name] for name in varied}
        words = [label, *(f"{name}={value}" for name, value in moving.items()), f"seed{seed}"]
        name = re.sub(r"[^\w.=+-]+", "_", "-".join(words))
        if len(name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"The point '{name[:80]}…' of the sweep has too long a name for a folder; give its "
                "curve a short 'label', or vary less."
            )
        yield Point(name, label, seed, moving, load_config(mapping, overrides))


def _alternatives(curve: dict[str, Any]) -> dict[str, list[Any]]:
    """What a curve's SAEs may differ in: each setting's values, one or more."""
    return {
        name: cast("list[Any]", value) if isinstance(value, list) else [value]
        for name, value in curve.items()
        if name not in ("architecture", "label", "seeds")
    }


def _seeds(value: Any, where: str) -> list[int]:
    """`value` as seeds. Raises ConfigError, naming `where`, for anything but whole numbers."""
    if not isinstance(value, list) or not all(type(seed) is int for seed in value):
        raise ConfigError(f"'{where}' must be a list of whole numbers, not {value!r:.80}.")
    return cast("list[int]", value)
