"""What sharing one stream of activations saves: a sweep against a `train` call per point.

    python benchmarks/sweep.py [SWEEP.yaml] [--only LABEL]... [--json]

Wall time of whole processes, start-up and measuring included, on both sides. Half of the `train`
calls come before the sweep and half after it, so that a machine that gets slower favours neither.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sae_gated_plugin.sweeps.grid import Point, load_sweep

QUICKSTART = Path(__file__).parents[1] / "configs" / "sweep_quickstart.yaml"


def seconds(*arguments: str | Path) -> float:
    """How long a `sae-gated` command takes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "sae_gated_plugin", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sweep = load_sweep(options.sweep)
    if sweep.eval_tokens is not None:
        raise SystemExit("`train` measures on its own number of tokens; take out eval_tokens.")
    points = [p for p in sweep.points if not options.only or p.label in options.only]
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=".") as name:  # a disk, where /tmp may be memory
        folder = Path(name)

        def train(some: list[Point]) -> None:
            for point in some:
                config = folder / f"{point.name}.yaml"
                config.write_text(point.config.to_yaml())
                output = folder / "alone" / point.name
                alone[point.name] = seconds("train", config, "--output", output)

        train(points[::2])
        only = [word for label in options.only for word in ("--only", label)]
        together = seconds("sweep", options.sweep, "--output", folder / "sweep", *only)
        train(points[1::2])
    result = {
        "points": len(points),
        "sweep_seconds": round(together, 1),
        "separate_seconds": round(sum(alone.values()), 1),
        "ratio": round(together / sum(alone.values()), 3),
        "each": {name: round(value, 1) for name, value in alone.items()},
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in alone.items():
        print(f"{value:8.1f} s  train {name}")
    print(f"{result['separate_seconds']:8.1f} s  separately")
    print(f"{result['sweep_seconds']:8.1f} s  as a sweep, {result['ratio']:.3f} of that")


if __name__ == "__main__":
    main()
