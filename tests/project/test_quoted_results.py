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
from sae_gated_plugin.report.reading import OF_FEATURES, read_results

ROOT = Path(__file__).parents[2]
README, RESULTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/RESULTS.md")
)
#: README's rows: the label on data of known features, the folder and label on SmolLM2-135M.
ROWS: dict[str, tuple[str, str, str]] = {
    "`gated` with `matryoshka_widths`": ("gated Matryoshka", "", ""),
    "`gated`, as published": ("gated", "ablations", "gated"),
    "`gated` without r_mag": ("", "ablations", "gated without r_mag"),
    "`prolu`, ReLU gradient": ("prolu (relu)", "comparison", "prolu (relu)"),
    "`relu` + L1, the paper's baseline": ("relu", "ablations", "relu + L1"),
    "`relu` + √L1": ("", "ablations", "relu + sqrt L1"),
    "SAELens's `matryoshka_batchtopk`": ("SAELens's matryoshka", "", ""),
    "SAELens's `batchtopk`": ("SAELens's batchtopk", "", ""),
    "SAELens's `jumprelu`": ("SAELens's jumprelu", "comparison", "jumprelu"),
    "SAELens's `topk`": ("", "comparison", "topk"),
    "SAELens's `gated`": ("", "comparison", "SAELens's gated"),
    "SAELens's `standard`": ("", "comparison", "standard"),
}
#: README's columns: on data of known features the measure and L0, on SmolLM2-135M the measure.
KNOWN_FEATURES = (("f1", 4), ("f1", 6), ("explained_variance", 4))
OF_THE_MODEL = ("l0", "loss_recovered", "fvu")
SETTINGS = ({"target_l0": 32}, {"k": 32}, {"l0_coefficient": 0.6})


def _rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first line starts with `heading`."""
    table = re.search(rf"^{re.escape(heading)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_the_table_of_the_readme() -> None:
    results = {
        folder: read_results([*(ROOT / "benchmarks" / folder / "results").glob("*.json")])[0]
        for folder in ("ablations", "comparison", "synthetic")
    }
    rows = _rows(README, "| | F1, L0 4 |")
    assert [row[0] for row in rows] == list(ROWS)
    for name, *cells in rows:
        features, folder, label = ROWS[name]
        for cell, (key, l0) in zip(cells[:3], KNOWN_FEATURES, strict=True):
            saes = [
                point
                for point in results["synthetic"]
                if point["label"] == features and [*point["settings"].values()] == [l0]
            ]
            _check(cell, saes, key, 3 if features else 0)
        coefficient = {"l1_coefficient": 10 if label == "SAELens's gated" else 6}
        saes = [
            point
            for point in results.get(folder, [])
            if point["label"] == label and point["settings"] in (*SETTINGS, coefficient)
        ]
        for cell, key in zip(cells[3:], OF_THE_MODEL, strict=True):
            _check(cell, saes, key, 2 if label else 0)


@pytest.mark.parametrize("folder", ["synthetic_16k", "synthetic"])
def test_the_tables_of_known_features(folder: str) -> None:
    points = read_results([*(ROOT / "benchmarks" / folder / "results").glob("*.json")])[0]
    text = RESULTS[RESULTS.index(f"sae-gated report benchmarks/{folder}/results") :]
    keys = ("l0", *OF_FEATURES, "gamma", "dead_share")
    rows = _rows(text, "| SAE, target L0 or k |")
    for name, *cells in rows:
        label, _, l0 = name.rpartition(", ")
        saes = [
            point
            for point in points
            if point["label"] == label and [*point["settings"].values()] == [int(l0)]
        ]
        for cell, key in zip(cells, keys, strict=True):
            values = np.array([sae[key] for sae in saes]) * (100 if key == "dead_share" else 1)
            assert len(values) == 3
            for quoted, value in zip(cell.split(" ± "), (values.mean(), values.std(ddof=1))):
                decimals = len(quoted.partition(".")[2])
                assert float(quoted) == pytest.approx(value, abs=0.501 * 10**-decimals)
    assert len(rows) == len({(point["label"], str(point["settings"])) for point in points})


def _check(cell: str, saes: list[dict[str, Any]], key: str, number: int) -> None:
    """A cell is the mean over so many SAEs, or empty."""
    assert len(saes) == number
    assert bool(cell) == bool(saes)
    if saes:
        text = cell.removesuffix(" %")
        mean = float(np.mean([sae[key] for sae in saes])) * (100 if text != cell else 1)
        assert float(text) == pytest.approx(mean, abs=0.501 * 10 ** -len(text.partition(".")[2]))


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
    lead, prose = compared[0], " ".join(README.split())
    assert lead["reference"] == "relu + L1"
    quoted = (
        f"{lead['ratio']:.0%} of the active latents of `relu` + L1 ({100 * lead['low']:.1f} to "
    )
    assert quoted.replace("%", " %") + f"{100 * lead['high']:.1f} over" in prose

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
        f"{ablations['relu + sqrt L1']['ratio']:.0%}".replace("%", " %") + " of those of" in prose
    )
