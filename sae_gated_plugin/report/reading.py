"""Reading results.json files, with a sentence for what is no result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

from ..errors import ConfigError
from ..results import GAP_FILE, PROBE_KEYS

#: One SAE's results.json: every key that a report uses, None or {} where the file has none.
Point = dict[str, Any]

RUNNER_FILE = "runner_cfg.json"  # as SAELens writes it; run.yaml names no seed that is a default

_TEXT, _WHOLE, _NUMBER, _PAIR = "text", "a whole number", "a number", "two numbers"
_OBJECT = "an object"
_METRICS = (
    *("l0", "fvu", "gamma", "gamma_centered", "loss_recovered"),
    *("nats_lost", "kl", "dead_share"),
)
#: Measures of SAEs on data whose true features are known, in the order of a page's tables.
OF_FEATURES = (
    *("f1", "precision", "recall", "mcc", "uniqueness", "explained_variance", "shrinkage"),
)
# What a key holds, and whether it may be missing or null, as in files of older versions.
_KEYS: dict[str, tuple[str, bool]] = {
    **dict.fromkeys(("architecture", "hook_name"), (_TEXT, False)),
    **dict.fromkeys(("d_in", "d_sae", "tokens"), (_WHOLE, False)),
    **dict.fromkeys(("label", "model_name", "dataset", "split"), (_TEXT, True)),
    **dict.fromkeys(("seed", "training_tokens"), (_WHOLE, True)),
    **dict.fromkeys((*_METRICS, *PROBE_KEYS, "l1_coefficient", "target_l0"), (_NUMBER, True)),
    **dict.fromkeys((*OF_FEATURES, "true_l0"), (_NUMBER, True)),
    "num_features": (_WHOLE, True),
    "gamma_ci": (_PAIR, True),
    **dict.fromkeys(("settings", "undefined", "histograms", "versions"), (_OBJECT, True)),
}
_SAME = {
    "model_name": "models",
    "hook_name": "hook points",
    "d_in": "widths d_in",
    "dataset": "evaluation datasets",
    "split": "splits of the evaluation dataset",
}


def read_results(paths: Sequence[str | Path]) -> tuple[list[Point], list[dict[str, Any]]]:
    """Read results and failures below `paths`: files, or folders searched recursively.

    Raises ConfigError where `points_of` does, for a path that does not exist and for no results.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ConfigError(
                f"'{path}' does not exist; give results.json files or folders of runs."
            )
        found = [path]
        if path.is_dir():
            found = sorted([*path.rglob("results.json"), *path.rglob("failed.json")])
        files.update({file.resolve(): file for file in found if file.resolve() not in files})
    failed = [_failure(file) for file in files.values() if file.name == "failed.json"]
    results = [file for file in files.values() if file.name != "failed.json"]
    points = points_of((file, load_json_result(file)) for file in results)
    for file, point in zip(results, points):
        point["encoder_gap"] = _gap(file.with_name(GAP_FILE))
        if point["seed"] is None:
            point["seed"] = _seed(file.with_name(RUNNER_FILE))
    if not points:
        given = ", ".join(f"'{path}'" for path in paths) or "no path"
        also = f" Every point failed, the first: {failed[0]['error']}" if failed else ""
        named = [path for path in map(Path, paths) if any(path.glob("*.json"))]
        if named and not failed:
            also += f" In folders files of other names are not read; give {named[0] / '*.json'}."
        raise ConfigError(
            f"No results in {given}: a report needs at least one results.json, as `sae-gated "
            f"train` and `sae-gated sweep` write it.{also}"
        )
    return points, failed


def points_of(results: Iterable[tuple[str | Path, Mapping[str, Any]]]) -> list[Point]:
    """Check results, each with the name that a sentence has for it, and fill in what is missing.

    Raises ConfigError for what is no result, and for results that do not belong together.
    """
    points = [_point(name, value) for name, value in results]
    for key, things in _SAME.items():
        known = [point for point in points if point[key] is not None]
        for point in known:
            if point[key] != known[0][key]:
                raise ConfigError(
                    f"Results of different {things} cannot be compared in one report: "
                    f"'{known[0]['file']}' has {known[0][key]!r}, '{point['file']}' has "
                    f"{point[key]!r}. Make one report for each."
                )
    return points


def _refuse(file: str | Path, what: str) -> NoReturn:
    raise ConfigError(f"'{file}' is not a result: {what} Mend it, or leave it out of the report.")


def load_json_result(file: Path) -> dict[str, Any]:
    """The JSON object in a results file. Raises ConfigError for anything else."""

    def not_a_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number in JSON; an undefined metric is null")

    try:
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=not_a_number)
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud800" is half a character
    except (OSError, ValueError, RecursionError) as error:
        _refuse(file, f"it cannot be read as JSON ({error}).")
    if not isinstance(value, dict):
        _refuse(file, f"it holds {type(value).__name__}, where a JSON object belongs.")
    return cast("dict[str, Any]", value)


def _is(kind: str, value: Any) -> bool:
    if kind == _PAIR:
        return isinstance(value, list) and len(value) == 2 and all(_is(_NUMBER, v) for v in value)
    if kind == _NUMBER:
        return type(value) in (int, float) and abs(value) < 1e300  # 1e999 is read as infinity
    return type(value) is {_TEXT: str, _WHOLE: int, _OBJECT: dict}[kind]


def _point(file: str | Path, value: Mapping[str, Any]) -> Point:
    point: Point = {"file": str(file), "encoder_gap": None}
    for key, (kind, optional) in _KEYS.items():
        given = value.get(key)
        if key not in value and (key in _METRICS or not optional):
            _refuse(file, f"the key '{key}' is missing; it holds {kind}.")
        if not (_is(kind, given) or (optional and given is None)):
            allowed = f"{kind} or null" if optional else kind
            _refuse(file, f"'{key}' must be {allowed}, not {json.dumps(given)[:80]}.")
        point[key] = {} if kind == _OBJECT and given is None else given
    for key in ("d_in", "d_sae", "tokens"):
        if not 0 < point[key] < 2**63:
            _refuse(file, f"'{key}' must be above zero and of at most 64 bits.")
    for key, most in (("l0", point["d_sae"]), ("dead_share", 1)):
        if (point[key] or 0) < 0:
            _refuse(file, f"'{key}' must not be negative, as {point[key]} is.")
        if (point[key] or 0) > most:
            _refuse(file, f"'{key}' must be at most {most}, and is {point[key]}.")
    for name, histogram in point["histograms"].items():
        if not _is_histogram(histogram):
            _refuse(
                file,
                f"'histograms.{name}' must have 'edges', n + 1 growing numbers, and 'counts', n "
                "whole numbers that are not negative.",
            )
    point["label"] = (point["label"] or "").strip() or point["architecture"]
    return point


def _is_histogram(value: Any) -> bool:
    try:
        edges, counts = value["edges"], value["counts"]
        return (
            all(_is(_NUMBER, edge) for edge in edges)
            and all(_is(_WHOLE, count) and count >= 0 for count in counts)
            and len(edges) == len(counts) + 1 > 1
            and all(low < high for low, high in pairwise(edges))
        )
    except (KeyError, TypeError):
        return False


def _gap(file: Path) -> dict[str, float] | None:
    """L0, and FVU in three parts: magnitude, selection, dictionary; None where FVU is undefined."""
    if not file.exists():
        return None
    codes = [load_json_result(file).get(name) for name in ("encoder", "refit", "pursuit")]
    try:
        l0, fvu = codes[0]["l0"], [code["fvu"] for code in codes]  # pyright: ignore
    except (TypeError, KeyError):
        _refuse(file, "'encoder', 'refit' and 'pursuit' must each hold 'l0' and 'fvu'.")
    if None in (l0, *fvu):
        return None
    if not all(_is(_NUMBER, number) for number in (l0, *fvu)):
        _refuse(file, "each 'l0' and 'fvu' must be a number or null.")
    parts = {"magnitude": fvu[0] - fvu[1], "selection": fvu[1] - fvu[2], "dictionary": fvu[2]}
    return {"l0": l0, **parts}


def _seed(file: Path) -> int | None:
    """The seed of a run's whole configuration, None where there is no such file or seed."""
    with contextlib.suppress(ConfigError):
        seed = load_json_result(file).get("seed")
        return seed if _is(_WHOLE, seed) else None
    return None


def _failure(file: Path) -> dict[str, Any]:
    value = load_json_result(file)
    value["label"] = value.get("label") or value.get("architecture")
    for key, kind in (("label", _TEXT), ("error", _TEXT), ("settings", _OBJECT)):
        if not _is(kind, value.setdefault(key, {})):
            _refuse(file, f"'{key}' must be {kind}, not {json.dumps(value[key])[:80]}.")
    return value
