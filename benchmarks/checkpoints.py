"""What checkpoints cost: the share of a training that writing, hashing and syncing them takes.

    python benchmarks/checkpoints.py [CONFIG.yaml] [KEY=VALUE]... [--checkpoints 20] [--json]

SAELens's default is n_checkpoints = 0: nothing is written before the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sae_gated_plugin
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.run import train
from sae_gated_plugin.training.runner import Runner

QUICKSTART = Path(sae_gated_plugin.__file__).parent / "quickstart" / "quickstart.yaml"


def timed(seconds: dict[str, float], owner: Any, name: str) -> None:
    action: Callable[..., Any] = getattr(owner, name)

    def measured(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return action(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - started

    setattr(owner, name, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=str(QUICKSTART))
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, float] = defaultdict(float)
    timed(seconds, checkpoints, "sync")
    timed(seconds, checkpoints, "sha256")
    timed(seconds, Runner, "_save")
    timed(seconds, Runner, "run")
    config = load_config(
        options.config, [f"n_checkpoints={options.checkpoints}", *options.overrides]
    )
    with tempfile.TemporaryDirectory(dir=".") as folder:  # a disk, where /tmp may be memory
        run = Path(folder) / "run"
        train(config, run, eval_tokens=2048)
        newest = checkpoints.numbered(run / "checkpoints")[-1:]
        size = sum(file.stat().st_size for path in newest for file in path.iterdir())
    safety = seconds["sync"] + seconds["sha256"]
    result = {
        "checkpoints": options.checkpoints,
        "bytes_each": size,
        "training_seconds": round(seconds["run"], 2),
        "saving_share": round(seconds["_save"] / seconds["run"], 4),
        "hash_and_sync_share": round(safety / seconds["run"], 4),
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
