"""What README and RESULTS.md quote from the comparison is what their commands print."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sae_gated_plugin.report.page import write_report
from sae_gated_plugin.report.reading import OF_FEATURES, read_results
from sae_gated_plugin.results import PROBE_KEYS

ROOT = Path(__file__).parents[2]
README, RESULTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/RESULTS.md")
)
probe_pairs = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "probe_pairs.py")))
#: README's rows: the label on data of known features, and on SmolLM2-135M.
ROWS: dict[str, tuple[str, str]] = {
    "`gated` with `matryoshka_widths`": ("gated Matryoshka", "gated Matryoshka"),
    "`gated`, as published": ("gated", "gated"),
    "`gated` without r_mag": ("", "gated without r_mag"),
    "`prolu`, ReLU gradient": ("prolu (relu)", "prolu (relu)"),
    "`relu` + L1, the paper's baseline": ("relu", "relu + L1"),
    "`relu` + √L1": ("", "relu + sqrt L1"),
    "SAELens's `matryoshka_batchtopk`": ("SAELens's matryoshka", "SAELens's matryoshka"),
    "SAELens's `batchtopk`": ("SAELens's batchtopk", "SAELens's batchtopk at lr 3e-4"),
    "SAELens's `topk`": ("", "SAELens's topk"),
    "SAELens's `jumprelu`": ("SAELens's jumprelu", "SAELens's jumprelu"),
    "SAELens's `gated`": ("", "SAELens's gated"),
    "SAELens's `standard`": ("", "SAELens's standard"),
}
#: README's columns: on data of known features the measure and L0, on SmolLM2-135M the measure.
KNOWN_FEATURES = (("f1", 4), ("f1", 6))
OF_THE_MODEL = ("probe_auc_1", "probe_auc_16", "l0", "loss_recovered", "fvu")
#: Labels with two seeds, of which the first was probed.
TWO_SEEDS = ("gated", "relu + L1")
#: Of those with no target, the λ whose L0 is nearest to 32.
NEAREST = {"SAELens's gated": 1.8, "SAELens's standard": 1.3}


def _rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first line starts with `heading`."""
    table = re.search(rf"^{re.escape(heading)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_the_table_of_the_readme() -> None:
    known, trained = map(_results, ("synthetic", "comparison_4608"))
    rows = _rows(README, "| | F1, L0 4 |")
    assert [row[0] for row in rows] == list(ROWS)
    for name, *cells in rows:
        features, label = ROWS[name]
        for cell, (key, l0) in zip(cells[:2], KNOWN_FEATURES, strict=True):
            saes = [sae for sae in known if _is(sae, features, l0)]
            _check(cell, saes, key, 3 if features else 0)
        saes = [sae for sae in trained if _is(sae, label, NEAREST.get(label, 32))]
        for cell, key in zip(cells[2:], OF_THE_MODEL, strict=True):
            of_key = [sae for sae in saes if sae[key] is not None]
            _check(cell, of_key, key, 2 if label in TWO_SEEDS and "probe" not in key else 1)


def test_the_table_of_the_longer_comparison() -> None:
    trained = _results("comparison_4608")
    keys = ("l0", "loss_recovered", "nats_lost", "fvu", "gamma", "dead_share")
    rows = _rows(RESULTS, "| SAE of 5,000 steps |")
    named: dict[str, list[dict[str, Any]]] = {}
    for sae in sorted(trained, key=lambda sae: sae["seed"]):
        named.setdefault(probe_pairs.name_of(sae), []).append(sae)
    assert {row[0] for row in rows} == set(named)
    for name, *cells in rows:
        for cell, key in zip(cells, keys, strict=True):
            percent = " %" if key in ("loss_recovered", "dead_share") else ""
            for of_seed, sae in zip(cell.split(", "), named[name], strict=True):
                _check(of_seed + percent, [sae], key, 1)


def test_the_table_of_learning_rates() -> None:
    """Rows: a label, then what else it differs in."""
    tuned = _results("comparison_4608", "tuning")
    others = {
        "bandwidth .5": {"jumprelu_bandwidth": 0.5},
        "bandwidth 1": {"jumprelu_bandwidth": 1.0},
        "λ 6": {"decoder_init_norm": 0.1},
        "λ 6, rows of norm 1": {"decoder_init_norm": 1.0},
    }
    rows = _rows(RESULTS, "| loss recovered, % (L0) | lr 1e-3 | lr 3e-3 |")
    for name, *cells in rows:
        label, _, other = name.partition(", ")
        for cell, lr in zip(cells, (1e-3, 3e-3), strict=True):
            settings = {**others.get(other, {}), "lr": lr}
            saes = [s for s in tuned if s["label"] == label and s["settings"] == settings]
            recovered, l0 = cell.removesuffix(")").split(" (")
            _check(f"{recovered} %", saes, "loss_recovered", 1)
            _check(l0, saes, "l0", 1)
    assert 2 * len(rows) == len(tuned)


def test_the_table_of_probes() -> None:
    """Means and leads of the CSV, which has the means of the results' files."""
    aucs = probe_pairs.read(ROOT / "benchmarks" / "comparison_4608" / "probes.csv")
    rows = _rows(RESULTS, "| SAE, probed |")
    assert rows == probe_pairs.table(aucs, "gated, target_l0 32")
    assert f"none comes near the raw activations ({rows[-1][-1].lstrip('0')})" in README
    for sae in _results("comparison_4608"):
        if sae["probe_auc_1"] is not None:
            of_csv = aucs[probe_pairs.name_of(sae)].mean((0, 1))
            assert of_csv == pytest.approx([sae[key] for key in PROBE_KEYS], abs=1e-4)


def _results(folder: str, of: str = "results") -> list[dict[str, Any]]:
    return read_results([*(ROOT / "benchmarks" / folder / of).glob("*.json")])[0]


def _is(sae: dict[str, Any], label: str, setting: float) -> bool:
    """A curve of one point has no settings."""
    return sae["label"] == label and [*sae["settings"].values()] in ([setting], [])


@pytest.mark.parametrize("folder", ["synthetic_16k", "synthetic"])
def test_the_tables_of_known_features(folder: str) -> None:
    points = _results(folder)
    text = RESULTS[RESULTS.index(f"sae-gated report benchmarks/{folder}/results") :]
    keys = ("l0", *OF_FEATURES, "gamma", "dead_share")
    rows = _rows(text, "| SAE, target L0 or k |")
    for name, *cells in rows:
        label, _, l0 = name.rpartition(", ")
        saes = [point for point in points if _is(point, label, int(l0))]
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
    lead = compared[0]
    assert lead["reference"] == "relu + L1"
    assert f"was larger after 750 steps, {100 * lead['ratio']:.0f} %." in " ".join(README.split())
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


def test_the_ratios_of_the_longer_comparison(page: Callable[[str], dict[str, Any]]) -> None:
    compared = {c["reference"]: c for c in page("runs/comparison_smollm2_page")["comparisons"]}
    rows = _rows(
        RESULTS, "| of the active latents of | % | range over pairs of seeds | at, % recovered |"
    )
    assert {row[0]: row[1:] for row in rows} == {
        label: _cells(comparison) for label, comparison in compared.items()
    }
    lead, root = compared["relu + L1"], compared["relu + sqrt L1"]
    quoted = (
        f"{100 * lead['ratio']:.1f} % of the active latents of `relu` + L1 for equal loss recovered"
        f" ({100 * lead['low']:.1f} to {100 * lead['high']:.1f} over pairs of seeds)",
        f"{100 * root['ratio']:.0f} % of those of `relu` + √L1",
    )
    assert all(part in " ".join(README.split()) for part in quoted)


def _cells(comparison: dict[str, Any]) -> list[str]:
    """What the table says of a comparison."""
    low, ratio, high = (
        f"{100 * value:.1f}" if value else ""
        for value in map(comparison.get, ("low", "ratio", "high"))
    )
    if comparison["interval"] == "bound":
        return [f"less than {high}" if high else f"more than {low}", "a bound", ""]
    if not ratio:
        return ["none", "", ""]
    recovered = dict.fromkeys(f"{100 * x:.2f}" for x in comparison["loss_recovered_range"])
    return [ratio, f"{low}–{high}" if low else "", "–".join(recovered)]
