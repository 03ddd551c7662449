"""Results in, one page out: figures, a table and the sentence that a reader looks for.

`write` reads `results.json` files and never loads a model or an SAE. Curves are compared at equal
loss recovered: how many active latents per token (L0) does each need?

A curve is one label's SAEs of one seed. Training is noisy, so more active latents do not always
recover more loss. What counts is its frontier: an SAE is left out if another of the same curve
recovers as much or more with no more active latents. Along what remains both numbers grow, and
log L0 is interpolated linearly between neighbours, as a function of loss recovered. Every curve is
treated alike, and nothing is extrapolated beyond its first or last SAE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import numpy as np
import numpy.typing as npt
from scipy import special

from . import plots
from .errors import ConfigError
from .plots import Point

Array = npt.NDArray[np.float64]
Seed = int | None
GENERATOR = "sae-gated report"
GAP_FILE = "encoder_gap.json"  # as `sae-gated encoder-gap` writes it beside results.json


# --- comparing curves -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How many active latents one label needs relative to another, at equal loss recovered.

    ratio, low, high: dimensionless; None where there is none, and `note` then says why. interval:
    "t" (95 %, Student's t over seeds), "range" (lowest to highest pair of seeds), "bound" (all that
    is known is that the ratio lies below `high`, or above `low`) or None.
    loss_recovered_range: (low, high), fractions, over which log L0 was averaged.
    """

    label: str
    reference: str
    note: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    loss_recovered_range: tuple[float, float] | None = None

    @property
    def claim(self) -> str:
        """The result in one sentence."""
        if self.interval == "bound":
            bound = (
                f"less than {100 * self.high:.1f}"
                if self.high
                else f"more than {100 * (self.low or 0):.1f}"
            )
            return (
                f"At equal loss recovered, {self.label} needs {bound} % of {self.reference}’s "
                "active latents."
            )
        if self.ratio is None:
            return f"No ratio can be given for {self.label} against {self.reference}."
        between = (
            "" if self.low is None else f" [{100 * self.low:.1f}–{100 * (self.high or 0):.1f} %]"
        )
        return (
            f"At equal loss recovered, {self.label} needs {100 * self.ratio:.1f} %{between} of "
            f"{self.reference}’s active latents."
        )


def frontier(l0: Sequence[float], loss_recovered: Sequence[float]) -> tuple[Array, Array]:
    """Return a curve's frontier: (log L0, loss recovered), each (k,), both strictly growing.

    l0, loss_recovered: (n,), one SAE each, in any order; l0 > 0. An SAE is left out if another one
    recovers as much or more with no more active latents. 1 <= k <= n, and k = 0 for n = 0.
    """
    kept: list[tuple[float, float]] = []
    for active, recovered in sorted(zip(l0, loss_recovered), key=lambda pair: (pair[0], -pair[1])):
        if not kept or recovered > kept[-1][1]:
            kept.append((math.log(active), recovered))
    array = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def mean_log_l0(curve: tuple[Array, Array], low: float, high: float) -> float:
    """Return the mean of log L0 over loss recovered from `low` to `high`, on a frontier.

    curve: (log L0, loss recovered) as `frontier` returns it, k >= 2, reaching from `low` to `high`.
    Exact for the piecewise linear interpolation. Raises ValueError outside the curve's range.
    """
    log_l0, recovered = curve
    if not recovered[0] <= low < high <= recovered[-1]:
        raise ValueError(
            f"[{low}, {high}] is not a range within the curve's, "
            f"[{recovered[0]}, {recovered[-1]}]; nothing is extrapolated"
        )
    inner = recovered[(recovered > low) & (recovered < high)]
    knots = np.concatenate([[low], inner, [high]])
    values = np.interp(knots, recovered, log_l0)
    return float((np.diff(knots) * (values[1:] + values[:-1]) / 2).sum() / (high - low))


def compare(
    label: str,
    curves: Mapping[Seed, tuple[Array, Array]],
    reference: str,
    reference_curves: Mapping[Seed, tuple[Array, Array]],
) -> Comparison:
    """Return label's L0 over reference's at equal loss recovered, with an interval over seeds.

    curves, reference_curves: seed → frontier. Those of fewer than two SAEs are left out. The range
    of loss recovered is the one common to all the others, of both labels; there the logarithm of
    the ratio is averaged. Three or more seeds in common: mean and Student's t interval (95 %) over
    the ratios of equal seeds. Fewer: mean and range over all pairs of seeds.
    """
    sides = [(label, curves), (reference, reference_curves)]
    usable = [
        {seed: curve for seed, curve in own.items() if len(curve[0]) >= 2} for _name, own in sides
    ]
    for (name, _own), remaining in zip(sides, usable):
        if not remaining:
            note = (
                f"A curve needs at least two SAEs of one seed, of which the one with more active "
                f"latents recovers more of the loss; {name} has none."
            )
            return Comparison(label, reference, note)
    low = max(float(curve[1][0]) for side in usable for curve in side.values())
    high = min(float(curve[1][-1]) for side in usable for curve in side.values())
    if low >= high:
        spans = "; ".join(
            f"{name}: {', '.join(_percent_range(c[1][0], c[1][-1]) for c in side.values())}"
            for (name, _own), side in zip(sides, usable)
        )
        note = (
            "No range of loss recovered is common to all their curves, and nothing is "
            f"extrapolated ({spans})."
        )
        ours, theirs = (list(side.values()) for side in usable)
        high, low = _bound(ours, theirs), _bound(theirs, ours)
        if high:
            note += f" {label}’s sparsest SAEs recover more than {reference}’s densest."
            return Comparison(label, reference, note, high=high, interval="bound")
        if low:
            note += f" {reference}’s sparsest SAEs recover more than {label}’s densest."
            return Comparison(label, reference, note, low=1 / low, interval="bound")
        return Comparison(label, reference, note)
    ours, theirs = ({s: mean_log_l0(c, low, high) for s, c in side.items()} for side in usable)
    common = [seed for seed in ours if seed in theirs]
    if len(common) >= 3:
        logs = np.array([ours[seed] - theirs[seed] for seed in common])
        quantile = float(special.stdtrit(len(logs) - 1, 0.975))
        half = quantile * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        bounds, interval = (logs.mean() - half, logs.mean() + half), "t"
        seeds = f"95 % interval by Student’s t over {len(common)} pairs of equal seeds"
    else:
        logs = np.array([one - other for one in ours.values() for other in theirs.values()])
        bounds, interval = (logs.min(), logs.max()), "range" if len(logs) > 1 else None
        seeds = (
            f"in brackets the range over all {len(logs)} pairs of seeds, not a confidence interval"
            if interval
            else "one seed each, so no interval"
        )
    note = f"Averaged over loss recovered from {_percent_range(low, high)}; {seeds}."
    for (name, own), side in zip(sides, usable):
        if len(side) < len(own):
            left_out = ", ".join("unknown" if s is None else str(s) for s in own if s not in side)
            note += f" Left out, with fewer than two SAEs to join: {name}, seed {left_out}."
    return Comparison(
        label,
        reference,
        note,
        ratio=float(np.exp(logs.mean())),
        low=float(np.exp(bounds[0])) if interval else None,
        high=float(np.exp(bounds[1])) if interval else None,
        interval=interval,
        loss_recovered_range=(low, high),
    )


def _bound(
    better: Sequence[tuple[Array, Array]], worse: Sequence[tuple[Array, Array]]
) -> float | None:
    """What the ratio of L0 lies below, if even the sparsest SAEs of `better` recover more.

    What the densest of `worse` recover takes `better` fewer latents still. Frontiers; None where
    the curves do not lie so, or the bound would be no news.
    """
    recovered = min(curve[1][0] for curve in better) >= max(curve[1][-1] for curve in worse)
    log_ratio = max(curve[0][0] for curve in better) - min(curve[0][-1] for curve in worse)
    return math.exp(log_ratio) if recovered and log_ratio < 0 else None


def _percent_range(low: float, high: float) -> str:
    return f"{100 * low:.2f} to {100 * high:.2f} %"


def comparisons(points: Sequence[Point], labels: Sequence[str]) -> list[Comparison]:
    """Compare the first of `labels` with each other one; 'standard' is always the reference."""
    curves: dict[str, dict[Seed, tuple[Array, Array]]] = {}
    for label in labels:
        mine = [
            point
            for point in points
            if point["label"] == label and point["l0"] and point["loss_recovered"] is not None
        ]
        seeds = sorted({point["seed"] for point in mine}, key=lambda seed: (seed is None, seed))
        curves[label] = {
            seed: frontier(
                [point["l0"] for point in mine if point["seed"] == seed],
                [point["loss_recovered"] for point in mine if point["seed"] == seed],
            )
            for seed in seeds
        }
    first, others = labels[0], labels[1:]
    pairs = [(other, first) if first == "standard" else (first, other) for other in others]
    return [compare(one, curves[one], other, curves[other]) for one, other in pairs]


# --- reading --------------------------------------------------------------------------------------

_TEXT, _WHOLE, _NUMBER, _PAIR, _OBJECT = (
    "text",
    "a whole number",
    "a number",
    "two numbers",
    "an object",
)
_METRICS = (
    *("l0", "fvu", "gamma", "gamma_centered", "loss_recovered"),
    *("nats_lost", "kl", "dead_share"),
)
# What a key holds, and whether it may be missing or null, as in files of older versions.
_KEYS: dict[str, tuple[str, bool]] = {
    **dict.fromkeys(("architecture", "hook_name"), (_TEXT, False)),
    **dict.fromkeys(("d_in", "d_sae", "tokens"), (_WHOLE, False)),
    **dict.fromkeys(("label", "model_name", "dataset", "split"), (_TEXT, True)),
    **dict.fromkeys(("seed", "training_tokens"), (_WHOLE, True)),
    **dict.fromkeys((*_METRICS, "l1_coefficient", "target_l0"), (_NUMBER, True)),
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


def read(paths: Sequence[str | Path]) -> tuple[list[Point], list[dict[str, Any]]]:
    """Read results and failures below `paths`: files, or folders searched recursively.

    Returns the points, with every key of `results.json` that the report uses (None or {} where the
    file has none, `label` filled in), and the failures. Raises ConfigError for a path that does not
    exist, a file that is no result, no results at all, and results that do not belong together.
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
    points = [_point(file) for file in files.values() if file.name != "failed.json"]
    for point in points:
        gap = Path(point["file"]).with_name(GAP_FILE)
        point["encoder_gap"] = _gap(gap) if gap.exists() else None
    if not points:
        given = ", ".join(f"'{path}'" for path in paths) or "no path"
        also = f" Every point failed, the first: {failed[0]['error']}" if failed else ""
        raise ConfigError(
            f"No results in {given}: a report needs at least one results.json, as `sae-gated "
            f"train` and `sae-gated sweep` write it.{also}"
        )
    for key, things in _SAME.items():
        known = [point for point in points if point[key] is not None]
        for point in known:
            if point[key] != known[0][key]:
                raise ConfigError(
                    f"Results of different {things} cannot be compared in one report: "
                    f"'{known[0]['file']}' has {known[0][key]!r}, '{point['file']}' has "
                    f"{point[key]!r}. Make one report for each."
                )
    return points, failed


def _refuse(file: Path, what: str) -> NoReturn:
    raise ConfigError(f"'{file}' is not a result: {what} Mend it, or leave it out of the report.")


def _load(file: Path) -> dict[str, Any]:
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


def _point(file: Path) -> Point:
    value = _load(file)
    point: Point = {"file": str(file)}
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
    if not isinstance(value, dict):
        return False
    histogram = cast("dict[str, Any]", value)
    edges, counts = histogram.get("edges"), histogram.get("counts")
    return (
        isinstance(edges, list)
        and isinstance(counts, list)
        and all(_is(_NUMBER, edge) for edge in edges)
        and all(_is(_WHOLE, count) and count >= 0 for count in counts)
        and len(edges) == len(counts) + 1 > 1
        and bool((np.diff(edges) > 0).all())
    )


def _gap(file: Path) -> dict[str, float] | None:
    """L0, and FVU in three parts: magnitude, selection, dictionary; None where FVU is undefined."""
    value = _load(file)
    codes = [value.get(name) for name in ("encoder", "refit", "pursuit")]
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


def _failure(file: Path) -> dict[str, Any]:
    value = _load(file)
    value["label"] = value.get("label") or value.get("architecture")
    for key, kind in (("label", _TEXT), ("error", _TEXT), ("settings", _OBJECT)):
        if not _is(kind, value.setdefault(key, {})):
            _refuse(file, f"'{key}' must be {kind}, not {json.dumps(value[key])[:80]}.")
    return value


# --- the page -------------------------------------------------------------------------------------


def write(paths: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Write `report.html`, `report.json` and `figures/*.png` into the folder `output`.

    paths: `results.json` files, or folders searched for them and for `failed.json`. Returns "page",
    "figures", "sentences", "comparisons" (fractions, not percent), "encoder_gap" (FVU in parts, of
    the SAEs that have the file), "points" and "failed" (counts); report.json holds the same, with
    paths relative to `output`. Raises ConfigError where `read`
    does, and rather than overwrite a file that is not a report.
    """
    points, failed = read(paths)
    output = Path(output)
    page, summary = output / "report.html", output / "report.json"
    stale = _require_replaceable(output, page, summary)
    present = {point["label"] for point in points}
    labels = sorted(present, key=lambda label: (label != "gated", label != "standard", label))
    points = [
        point
        for label in labels
        for group in plots.by_setting([p for p in points if p["label"] == label])
        for point in sorted(group, key=lambda p: (p["seed"] is None, p["seed"] or 0, p["file"]))
    ]
    compared = comparisons(points, labels)
    drawings = plots.draw(points, labels)
    figures = [f"figures/{drawing.name}.png" for drawing in drawings]
    result: dict[str, Any] = {
        "page": page.name,
        "figures": figures,
        "sentences": [f"{comparison.claim} {comparison.note}" for comparison in compared],
        "comparisons": [
            {key: value for key, value in vars(comparison).items() if key != "note"}
            for comparison in compared
        ],
        "encoder_gap": [
            {"label": point["label"], "seed": point["seed"], **point["encoder_gap"]}
            for point in points
            if point["encoder_gap"]
        ],
        "points": len(points),
        "failed": len(failed),
    }
    html = _render(points, failed, labels, compared, drawings)
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        for name in stale - set(figures):
            (output / name).unlink(missing_ok=True)
        for name, drawing in zip(figures, drawings):
            (output / name).write_bytes(drawing.png)
        page.write_text(html, encoding="utf-8")
        summary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The report cannot be written to '{output}': {error}") from error
    paths_here = {"page": str(page), "figures": [str(output / name) for name in figures]}
    return {**json.loads(text), **paths_here}


def _require_replaceable(output: Path, page: Path, summary: Path) -> set[str]:
    """Raise ConfigError unless `output` is free or holds a report; return that one's figures."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"'{output}' is a file; give a folder for the report.")
    for file, mark in ((page, f'content="{GENERATOR}"'), (summary, '"comparisons"')):
        if file.exists() and mark.encode() not in (file.read_bytes() if file.is_file() else b""):
            raise ConfigError(f"'{file}' exists and is not a report of ours; give another folder.")
    old = _load(summary).get("figures", []) if summary.exists() else []
    return {f"figures/{Path(name).name}" for name in old}


_COLUMNS = {
    "l0": ("L0", "{:.1f}"),
    "loss_recovered": ("loss recovered", "{:.2%}"),
    "nats_lost": ("nats lost", "{:.4f}"),
    "kl": ("KL", "{:.4f}"),
    "fvu": ("FVU", "{:.4f}"),
    "gamma": ("γ [95 % interval]", "{:.4f}"),
    "gamma_centered": ("γ about the mean", "{:.4f}"),
    "dead_share": ("dead latents", "{:.2%}"),
    "l1_coefficient": ("λ", "{:.4g}"),
}


def _render(
    points: list[Point],
    failed: list[dict[str, Any]],
    labels: list[str],
    compared: list[Comparison],
    drawings: list[plots.Drawing],
) -> str:
    reasons: dict[str, int] = {}  # reason → number of its note under the table
    versions: dict[str, set[str]] = {}
    for point in points:
        for name, version in point["versions"].items():
            versions.setdefault(name, set()).add(str(version))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        generator=GENERATOR,
        first=points[0],
        model=next((p["model_name"] for p in points if p["model_name"]), None),
        dataset=next((p["dataset"] for p in points if p["dataset"]), None),
        split=next((p["split"] for p in points if p["split"]), None),
        spans={key: _span(points, key) for key in ("d_sae", "training_tokens", "tokens")},
        seeds=sorted({p["seed"] for p in points if p["seed"] is not None}),
        labels=labels,
        cautions=_cautions(points),
        comparisons=compared,
        drawings=drawings,
        columns=[heading for heading, _form in _COLUMNS.values()],
        rows=[(p["label"], _setting(p["settings"]), p["seed"], _cells(p, reasons)) for p in points],
        reasons=reasons,
        failed=[{**failure, "setting": _setting(failure["settings"])} for failure in failed],
        versions={name: sorted(found) for name, found in sorted(versions.items())},
    )


def _cells(point: Point, reasons: dict[str, int]) -> list[tuple[str, int | None]]:
    """One row's texts, each with the number of the note that says why there is no value."""
    cells: list[tuple[str, int | None]] = []
    for key, (_heading, form) in _COLUMNS.items():
        value, missing = point[key], key
        text = "none" if value is None else form.format(value).replace("%", "\u00a0%")
        if key == "gamma" and value is not None:
            low_high = point["gamma_ci"]
            text += f" [{low_high[0]:.4f}–{low_high[1]:.4f}]" if low_high else " [none]"
            missing, value = "gamma_ci", low_high
        note = None
        if value is None:
            reason = str(point["undefined"].get(missing, "Not recorded in the results file."))
            note = reasons.setdefault(reason, len(reasons) + 1)
        cells.append((text, note))
    return cells


def _setting(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} =\u00a0{value}" for key, value in settings.items()) or "–"


def _span(points: list[Point], key: str) -> str:
    values = sorted({point[key] for point in points if point[key] is not None})
    return " to ".join(f"{value:,}" for value in dict.fromkeys([*values[:1], *values[-1:]]))


def _cautions(points: list[Point]) -> list[str]:
    """What a reader must know before comparing: where the SAEs are not alike."""
    found: list[str] = []
    for key, what in (
        ("d_sae", "number of latents (d_sae)"),
        ("training_tokens", "number of training tokens"),
        ("tokens", "number of tokens they were measured on"),
    ):
        values = [point[key] for point in points if point[key] is not None]
        if len(set(values)) > 1:
            each = ", ".join(f"{v:,} (for {values.count(v)})" for v in sorted(set(values)))
            found.append(f"The SAEs differ in the {what}: {each}.")
    for key, what in (
        *(("model_name", "model"), ("dataset", "evaluation dataset")),
        *(("training_tokens", "number of training tokens"), ("seed", "seed")),
    ):
        missing = sum(point[key] is None for point in points)
        if missing:
            found.append(f"The {what} is not recorded for {missing} of {len(points)} SAEs.")
    if any(point["split"] == "train" for point in points):
        found.append("The SAEs were measured on split ‘train’, which training may have seen.")
    return found
