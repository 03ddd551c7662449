"""Results in, one page out: figures, a table and the sentence that a reader looks for.

`write_report` reads `results.json` files and never loads a model or an SAE. Curves are compared at
equal loss recovered: how many active latents per token (L0) does each need?

A curve is one label's SAEs of one seed. Training is noisy, so more active latents do not always
recover more loss. What counts is its frontier: an SAE is left out if another of the same curve
recovers as much or more with no more active latents. Along what remains both numbers grow, and
log L0 is interpolated linearly between neighbours, as a function of loss recovered. Every curve is
treated alike, and nothing is extrapolated beyond its first or last SAE.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..errors import ConfigError
from ..results import MEASURES, PROBE_KEYS, Measure, setting_of, shortcomings
from .comparison import Comparison, comparisons
from .figures import by_setting, draw
from .means import mean_text, means_over_seeds
from .reading import OF_FEATURES, Point, load_json_result, points_of, read_results
from .style import Drawing

GENERATOR = "sae-gated report"

#: A click on a heading, or Enter, sorts its table, what has no value last. The page allows this
#: script by its hash alone.
_SORT = """
for (const table of document.querySelectorAll("table.sortable"))
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const words = head.classList.contains("text");
    const value = row => {
      const text = row.cells[column].textContent.trim();
      return words ? text : parseFloat(text.replace(/,/g, "").replace(/^(less|more) than /, ""));
    };
    const sort = () => {
      const up = head.ariaSort !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = (a, b) => words ? a.localeCompare(b, "en", {numeric: true}) : a - b;
      const none = Number.isNaN;
      const compare = (a, b) => none(a) - none(b) || (up ? order(a, b) : order(b, a));
      const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b)));
      table.tBodies[0].append(...rows);
    };
    head.tabIndex = 0;
    head.onclick = sort;
    head.onkeydown = event => event.key === "Enter" && sort();
  });
"""
_SORT_HASH = "sha256-" + base64.b64encode(hashlib.sha256(_SORT.encode()).digest()).decode()


def figures_of(results: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Draw the figures of results that are in memory, each as a results.json holds it.

    Raises ConfigError for what is no result, and for results that do not belong together.
    """
    return draw(*_in_order(points_of((f"result {i + 1}", r) for i, r in enumerate(results))))


def write_report(paths: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Write `report.html`, `report.json` and `figures/*.png` into the folder `output`.

    paths: `results.json` files, or folders searched for them and for `failed.json`. Returns "page",
    "figures", "sentences", "comparisons" (fractions, not percent), "encoder_gap" (FVU in parts, of
    the SAEs that have the file), "points" and "failed" (counts), on data of known features "means"
    over seeds; report.json holds the same, with paths relative to `output`. Raises ConfigError
    where `read_results` does, and rather than overwrite a file that is not a report.
    """
    points, failed = read_results(paths)
    output = Path(output)
    page, summary = output / "report.html", output / "report.json"
    stale = _require_replaceable(output, page, summary)
    points, labels = _in_order(points)
    synthetic = of_features(points)
    compared = [] if synthetic else comparisons(points, labels)
    drawings = draw(points, labels)
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
        **({"means": means_over_seeds(points, labels, _columns(points))} if synthetic else {}),
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


def _in_order(points: Sequence[Point]) -> tuple[list[Point], list[str]]:
    """The points by label, L0 and seed, and the labels: gated first, then standard."""
    present = {point["label"] for point in points}
    labels = sorted(present, key=lambda label: (label != "gated", label != "standard", label))
    ordered = [
        point
        for label in labels
        for group in by_setting([p for p in points if p["label"] == label])
        for point in sorted(group, key=lambda p: (p["seed"] is None, p["seed"] or 0, p["file"]))
    ]
    return ordered, labels


def _require_replaceable(output: Path, page: Path, summary: Path) -> set[str]:
    """Raise ConfigError unless `output` is free or holds a report; return that one's figures."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"'{output}' is a file; give a folder for the report.")
    for file, mark in ((page, f'content="{GENERATOR}"'), (summary, '"comparisons"')):
        if file.exists() and mark.encode() not in (file.read_bytes() if file.is_file() else b""):
            raise ConfigError(f"'{file}' exists and is not a report of ours; give another folder.")
    old = load_json_result(summary).get("figures", []) if summary.exists() else []
    return {f"figures/{Path(name).name}" for name in old}


_OF_TEXT = ("loss_recovered", "nats_lost", "kl", "fvu", "gamma", "gamma_centered")


def of_features(points: Sequence[Point]) -> bool:
    """Whether SAEs were measured on data of known features: there is no model, so no loss."""
    return any(point["f1"] is not None for point in points)


def _columns(points: Sequence[Point]) -> list[Measure]:
    kind = (*OF_FEATURES, "gamma") if of_features(points) else _OF_TEXT
    probed = [key for key in PROBE_KEYS if any(point[key] is not None for point in points)]
    return [MEASURES[key] for key in ("l0", *kind, "dead_share", "l1_coefficient", *probed)]


def _render(
    points: list[Point],
    failed: list[dict[str, Any]],
    labels: list[str],
    compared: list[Comparison],
    drawings: list[Drawing],
) -> str:
    columns = _columns(points)
    means = means_over_seeds(points, labels, columns) if of_features(points) else []
    reasons: dict[str, int] = {}  # reason → number of its note under the table
    model = next((p["model_name"] for p in points if p["model_name"]), None)
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
    first = points[0]
    title = f"Sparse autoencoders at {first['hook_name']}"
    if means:
        title = f"Sparse autoencoders on data of {first['num_features']:,} known features"
    elif model:
        title += f" of {model}"
    return environment.get_template("report.html.jinja").render(
        generator=GENERATOR,
        title=title,
        unit="samples" if means else "tokens",
        first=first,
        model=model,
        dataset=next((p["dataset"] for p in points if p["dataset"]), None),
        split=next((p["split"] for p in points if p["split"]), None),
        spans={key: _span(points, key) for key in ("d_sae", "training_tokens", "tokens")},
        seeds=sorted({p["seed"] for p in points if p["seed"] is not None}),
        labels=labels,
        cautions=_cautions(points),
        comparisons=compared,
        script=_SORT,
        script_hash=_SORT_HASH,
        drawings=drawings,
        columns=columns,
        rows=[(p["label"], _setting(p), p["seed"], _cells(p, columns, reasons)) for p in points],
        means=[
            (m["label"], _setting(m), m["seeds"], [mean_text(c, m[c.key]) for c in columns])
            for m in means
        ],
        reasons=reasons,
        failed=[{**failure, "setting": _setting(failure)} for failure in failed],
        versions={name: sorted(found) for name, found in sorted(versions.items())},
    )


def _cells(
    point: Point, columns: Sequence[Measure], reasons: dict[str, int]
) -> list[tuple[str, int | None]]:
    """One row's texts, each with the number of the note that says why there is no value."""
    cells: list[tuple[str, int | None]] = []
    for measure in columns:
        key = missing = measure.key
        value = point[key]
        text = measure.text(value).replace("%", "\u00a0%")
        if key == "gamma" and value is not None and not of_features([point]):
            missing, value = "gamma_ci", point["gamma_ci"]
            text += f" [{'–'.join(map(measure.text, value)) if value else 'none'}]"
        note = None
        if value is None:
            reason = str(point["undefined"].get(missing, "Not recorded in the results file."))
            note = reasons.setdefault(reason, len(reasons) + 1)
        cells.append((text, note))
    return cells


def _setting(results: Mapping[str, Any]) -> str:
    found = setting_of(results)
    return ", ".join(f"{key} =\u00a0{value}" for key, value in found.items()) or "–"


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
    missed = sum(bool(shortcomings(point)) for point in points)
    if missed:
        found.append(
            f"{missed} of {len(points)} SAEs missed their target_l0, or have no active latent."
        )
    if any(point["split"] == "train" for point in points):
        found.append("The SAEs were measured on split ‘train’, which training may have seen.")
    return found
