"""Probed SAEs against one of them, data set by data set.

    python benchmarks/probe_pairs.py runs/comparison_smollm2/points/* --write probes.csv
    python benchmarks/probe_pairs.py probes.csv --against gated

RUN: folders of a sweep's points that `sae-gated probe` has probed. The CSV has the area under the
curve of every SAE, data set and seed. Printed is each SAE's mean, and by how much it is above the
one it is compared with: means over seeds, differences over data sets, 95 % interval (Student's t)
over data sets, which are the larger source of chance.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from sae_gated_plugin.files import read_json
from sae_gated_plugin.measure.probe import PROBES_FILE
from sae_gated_plugin.results import PROBE_KEYS

COLUMNS = ("sae", "dataset", "seed", *PROBE_KEYS)
DECIMALS = 4
#: Of an SAE: the measures of each data set and seed, (data sets, seeds, measures).
Aucs = dict[str, np.ndarray]


def name_of(results: dict[str, Any]) -> str:
    """The label, and in what the point differs from others of it."""
    settings = {key.replace("l1_coefficient", "λ"): v for key, v in results["settings"].items()}
    return ", ".join([results["label"], *(f"{key} {value}" for key, value in settings.items())])


def rows_of(run: Path) -> Iterable[list[str | int | float]]:
    """A run's rows of the CSV."""
    name = name_of(read_json(run / "results.json"))
    for dataset, aucs in read_json(run / PROBES_FILE)["by_dataset"].items():
        for seed, values in enumerate(zip(*(aucs[key] for key in PROBE_KEYS), strict=True)):
            yield [name, dataset, seed, *(round(value, DECIMALS) for value in values)]


def read(file: Path) -> Aucs:
    """What a CSV has, the data sets in its order."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            values = [float(row[key]) for key in PROBE_KEYS]
            found.setdefault(row["sae"], {}).setdefault(row["dataset"], []).append(values)
    return {sae: np.array([*datasets.values()]) for sae, datasets in found.items()}


def table(aucs: Aucs, against: str) -> list[list[str]]:
    """Rows: the SAE, then per measure its mean and its lead with the interval's half."""
    rows: list[list[str]] = []
    for sae, values in aucs.items():
        lead = (values - aucs[against]).mean(1)
        half = t.ppf(0.975, len(lead) - 1) * lead.std(0, ddof=1) / math.sqrt(len(lead))
        cells = [
            f"{mean:.3f}" + (f" ({above:+.3f} ± {bound:.3f})" if sae != against else "")
            for mean, above, bound in zip(values.mean((0, 1)), lead.mean(0), half, strict=True)
        ]
        rows.append([sae, *cells[:-1]])
    raw = aucs[against][..., -1].mean()
    return [*rows, ["raw activations", *[""] * (len(PROBE_KEYS) - 2), f"{raw:.3f}"]]


def main() -> None:
    """Write or read the CSV, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|CSV")
    parser.add_argument("--write", type=Path, help="the CSV, from runs")
    parser.add_argument("--against", help="the SAE to compare with; default: the first")
    arguments = parser.parse_args()
    file = arguments.paths[0]
    if arguments.write:
        file = arguments.write
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(COLUMNS)
            for run in arguments.paths:
                writer.writerows(rows_of(run))
    aucs = read(file)
    against = arguments.against or next(iter(aucs))
    heads = ["SAE", *(f"k = {key.rpartition('_')[2]}" for key in PROBE_KEYS[:-1])]
    for row in [heads, *table(aucs, against)]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
