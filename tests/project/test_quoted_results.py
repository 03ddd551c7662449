"""What README and RESULTS.md quote from the comparison is what their commands print."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_gated_plugin.report.page import write_report
from sae_gated_plugin.report.reading import read_results

ROOT = Path(__file__).parents[2]
README, RESULTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/RESULTS.md")
)
#: README's rows, by the folder and label of their results.
ROWS = {
    "`gated` without r_mag": ("ablations", "gated without r_mag"),
    "`gated`, as published": ("ablations", "gated"),
    "`relu` + √L1": ("ablations", "relu + sqrt L1"),
    "`prolu`, ReLU gradient": ("comparison", "prolu (relu)"),
    "`relu` + L1, the paper's baseline": ("ablations", "relu + L1"),
    "`prolu`, straight-through gradient": ("comparison", "prolu (ste)"),
    "SAELens's `topk`": ("comparison", "topk"),
    "SAELens's `jumprelu`": ("comparison", "jumprelu"),
    "SAELens's `gated`": ("comparison", "SAELens's gated"),
    "SAELens's `standard`": ("comparison", "standard"),
}
SETTINGS = ({"target_l0": 32}, {"k": 32}, {"l0_coefficient": 0.6})


def _rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first line starts with `heading`."""
    table = re.search(rf"^{re.escape(heading)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def _number(text: str) -> float:
    return float(text.removesuffix(" %"))


def test_the_table_of_the_readme() -> None:
    points = {
        folder: read_results([*(ROOT / "benchmarks" / folder / "results").glob("*.json")])[0]
        for folder in ("ablations", "comparison")
    }
    rows = _rows(README, "| | L0 |")
    assert [row[0] for row in rows] == list(ROWS)
    for name, *cells in rows:
        folder, label = ROWS[name]
        coefficient = {"l1_coefficient": 10 if label == "SAELens's gated" else 6}
        saes = [
            point
            for point in points[folder]
            if point["label"] == label and point["settings"] in (*SETTINGS, coefficient)
        ]
        assert len(saes) == 2
        for cell, key, scale in zip(
            cells,
            ("l0", "loss_recovered", "fvu", "gamma", "dead_share"),
            (1, 100, 1, 1, 100),
            strict=True,
        ):
            decimals = len(cell.removesuffix(" %").partition(".")[2])
            mean = float(np.mean([sae[key] for sae in saes])) * scale
            assert _number(cell) == pytest.approx(mean, abs=0.501 * 10**-decimals), (name, key)
    recovered = [_number(row[2]) for row in rows]
    assert recovered == sorted(recovered, reverse=True)


#: README's rows of known features, by the label of their results.
OF_FEATURES = {
    "`gated` with `matryoshka_widths`": "gated Matryoshka",
    "`gated`, as published": "gated",
    "SAELens's `matryoshka_batchtopk`": "SAELens's matryoshka",
    "SAELens's `batchtopk`": "SAELens's batchtopk",
}


def test_the_table_of_known_features() -> None:
    points = read_results([*(ROOT / "benchmarks/synthetic/results").glob("*.json")])[0]
    rows = _rows(README, "| of known features |")
    assert [row[0] for row in rows] == list(OF_FEATURES)
    for name, *cells in rows:
        for cell, key, l0 in zip(cells, ("f1", "f1", "explained_variance"), (4, 6, 4), strict=True):
            saes = [
                point[key]
                for point in points
                if point["label"] == OF_FEATURES[name] and [*point["settings"].values()] == [l0]
            ]
            assert len(saes) == 3
            assert _number(cell) == pytest.approx(np.mean(saes), abs=0.000501), (name, key, l0)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the command of RESULTS.md with this `--output` reports."""

    def report(output: str) -> dict[str, Any]:
        command = RESULTS.replace("\\\n", " ")
        found = re.search(rf"^sae-gated report (.*) --output {output}$", command, re.M)
        assert found
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {found[1]}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        return write_report([ROOT / word for word in words], tmp_path_factory.mktemp("page") / "p")

    return report


def test_the_ratios(page: Callable[[str], dict[str, Any]]) -> None:
    compared = page("runs/comparison")["comparisons"]
    rows = _rows(RESULTS, "| of the active latents of | % | range over pairs of seeds | between")
    assert [row[0] for row in rows] == [comparison["reference"] for comparison in compared]
    for (_, share, between, recovered), c in zip(rows, compared, strict=True):
        if c["interval"] == "bound":
            assert share == f"less than {100 * c['high']:.1f}"
            continue
        assert share == f"{100 * c['ratio']:.1f}"
        assert between == f"{100 * c['low']:.1f}–{100 * c['high']:.1f}"
        assert recovered == "{:.2f}–{:.2f}".format(*(100 * x for x in c["loss_recovered_range"]))
    lead = compared[0]
    assert lead["reference"] == "relu + L1"
    quoted = (
        f"{lead['ratio']:.0%} of the active latents of `relu` + L1 ({100 * lead['low']:.1f} to "
    )
    assert quoted.replace("%", " %") + f"{100 * lead['high']:.1f} over" in README

    ablations = {c["reference"]: c for c in page("runs/ablations")["comparisons"]}
    for label, share, between, _ in _rows(
        RESULTS, "| of the active latents of | % | range over pairs of seeds | the"
    ):
        c = ablations[
            {"relu + L1, unit norm": "relu + L1", "relu + √L1": "relu + sqrt L1"}.get(label, label)
        ]
        if c["interval"] == "bound":
            assert share == f"less than {100 * c['high']:.1f}"
        else:
            assert (share, between) == (
                f"{100 * c['ratio']:.1f}",
                f"{100 * c['low']:.1f}–{100 * c['high']:.1f}",
            )
    assert (
        f"{ablations['relu + sqrt L1']['ratio']:.0%}".replace("%", " %") + " of those of" in README
    )
