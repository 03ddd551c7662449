"""From a sweep's file to its points."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sae_lens import LanguageModelSAERunnerConfig

from ..config.check import check_config, config_section
from ..config.grid import file_name, known_fields, require_label, take_entries
from ..config.run import RunConfig, load_config, read
from ..config.yaml import Origins
from ..errors import ConfigError

#: More is a slip of the hand: lists multiply.
MOST_POINTS = 10_000


@dataclass(frozen=True)
class Kind:
    """What the points of a sweep are. fields: what a configuration of theirs has beside its
    sections; load: reads and checks one, with overrides.
    """

    fields: frozenset[str]
    load: Callable[[Mapping[str, Any], Sequence[str]], RunConfig]


#: SAEs of a language model's activations.
RUNS = Kind(
    frozenset(field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)), load_config
)

#: A curve's settings, each with its values, one or more.
Alternatives = dict[str, list[Any]]


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


@dataclass(frozen=True)
class _Section:
    """What `sweep` says beside its curves."""

    seeds: list[int] | None = None
    eval_tokens: int | None = None


@dataclass(frozen=True)
class _Curve:
    """What a curve says beside the settings of its SAEs."""

    architecture: str
    label: str | None = None
    seeds: list[int] | None = None


def load_sweep(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), kind: Kind = RUNS
) -> Sweep:
    """Read a sweep, apply the overrides, check every point; raise ConfigError as `load_config`.

    An override of what a run's file may hold, such as `sae.d_sae=64`, holds for every point,
    whatever its curve says; `sweep.seeds=[0]` and the like override the sweep itself.
    """
    whole, origins = read(source, overrides)
    section = config_section(dict(whole), "sweep", origins)
    if not section:
        raise ConfigError("A sweep needs a 'sweep' section with 'curves'; there is none.")
    shared = {name: value for name, value in whole.items() if name != "sweep"}
    architecture = config_section(dict(shared), "sae", origins).get("architecture")
    curves = take_entries(dict(section), "curves", origins, "sweep.")
    for settings in (section, *curves):
        for name in [name for name in settings if _key(name, kind) in origins.overrides]:
            del settings[name]
    own = {name: value for name, value in section.items() if name != "curves"}
    about = _Section(**check_config(_Section, own, "sweep.", origins, aliases=("curves",)))
    if about.eval_tokens is not None and about.eval_tokens < 2:
        raise ConfigError(f"'sweep.eval_tokens' must be above 1, not {about.eval_tokens}.")
    seeds = [shared.get("seed", 0)] if about.seeds is None else about.seeds
    expanded = [
        _alternatives(curve, f"sweep.curves[{index}].", architecture, seeds, origins)
        for index, curve in enumerate(curves)
    ]
    number = sum(math.prod(map(len, alternatives.values())) for _, alternatives in expanded)
    if number > MOST_POINTS:
        raise ConfigError(f"The sweep has {number:,} points; at most {MOST_POINTS:,} are allowed.")
    of_runs = [text for text in overrides if text.strip().split("=")[0].split(".")[0] != "sweep"]
    points = [
        point
        for label, alternatives in expanded
        for point in _points(label, alternatives, shared, of_runs, kind)
    ]
    if not points:
        raise ConfigError("The sweep is empty: 'sweep.curves' and 'sweep.seeds' give no point.")
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            "Two points of the sweep are the same, or have labels that differ in symbols only: "
            f"{', '.join(twice)}."
        )
    return Sweep(whole, points, about.eval_tokens)


def _key(name: str, kind: Kind) -> str:
    """Where a run's file has what a curve, or the sweep, calls `name`."""
    if name == "seeds":
        return "seed"
    return name if name in kind.fields else f"sae.{name}"


def _alternatives(
    curve: dict[str, Any], where: str, architecture: Any, seeds: list[int], origins: Origins
) -> tuple[str, Alternatives]:
    """A curve's label and settings; the architecture is the first of them, the seed the last.

    architecture, seeds: those of a curve that gives none.
    """
    settings = dict(curve)
    if architecture is not None:
        settings.setdefault("architecture", architecture)
    own = {key: settings.pop(key) for key in ("architecture", "label", "seeds") if key in settings}
    about = _Curve(**check_config(_Curve, own, where, origins))
    label = require_label(about.architecture if about.label is None else about.label)
    if "seed" in settings:
        raise ConfigError(f"The curve '{label}' gives 'seed'; a curve's seeds are a list, 'seeds'.")
    lists = {
        name: cast("list[Any]", value) if isinstance(value, list) else [value]
        for name, value in settings.items()
    }
    own_seeds = seeds if about.seeds is None else about.seeds
    return label, {"architecture": [about.architecture], **lists, "seed": own_seeds}


def _points(
    label: str,
    alternatives: Alternatives,
    shared: dict[str, Any],
    overrides: Sequence[str],
    kind: Kind,
) -> Iterator[Point]:
    """The points of one curve: all combinations of its alternatives."""
    for combination in itertools.product(*alternatives.values()):
        chosen = dict(zip(alternatives, combination))
        seed = chosen.pop("seed")
        sae = known_fields(shared.get("sae") or {}, chosen["architecture"])
        mapping = {**shared, "seed": seed, "sae": sae}
        for name, value in chosen.items():
            (mapping if name in kind.fields else sae)[name] = value
        moving = {name: value for name, value in chosen.items() if len(alternatives[name]) > 1}
        words = [label, *(f"{name}={value}" for name, value in moving.items()), f"seed{seed}"]
        config = kind.load(mapping, overrides)
        yield Point(file_name("-".join(words)), label, seed, moving, config)
