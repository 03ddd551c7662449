"""Many runs: a grid over architectures, λ or target L0, and seeds.

A sweep's file is a run's configuration with a section more:

    sae: {d_in: 576, d_sae: 2304}                 what the points share
    sweep:
      seeds: [0, 1]
      eval_tokens: 262_144
      curves:
        - {label: gated, architecture: gated, l1_coefficient: [4, 8, 16]}
        - {label: topk, architecture: topk, k: [16, 32, 64]}

A list stands for alternatives; all combinations are points. A curve may have `seeds` of its own. On
one machine points that differ in nothing but `sae` and seed are trained side by side on one stream
of activations (SAELens's MultiSAETrainer), so N SAEs cost one pass of the language model;
`engine="ray"` makes each point a task on a Ray cluster instead.

The folder: `sweep.yaml`; `points/NAME/`, each like a run's folder, or with a `failed.json`;
`streams/`, checkpoints of what is under way. Starting the same sweep again does what is missing.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.yaml import to_yaml
from ..errors import ConfigError, Interrupted, unknown_name
from ..model.text import open_text
from .folder import SWEEP_FILE, PointFolder
from .grid import Sweep
from .stream import GO_ON, streams_of

_NOT_IN_STREAMS = ("use_cached_activations", "from_pretrained_path", "compile_sae")


def run_sweep(
    sweep: Sweep, output: str | Path, engine: str = "local", only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Train and measure what is not there yet; return the results of all points, failed ones too.

    output: the sweep's folder. engine: "local", or "ray" for the cluster that `RAY_ADDRESS` names
    (a local one where it names none). only: labels of the curves to do this time, default all.
    A point that fails is recorded and the others go on; to try it again, delete its folder. One
    that is trained and could not be measured is measured again without that.
    Raises ConfigError for a folder that holds another sweep's points, Interrupted on SIGINT, and on
    SIGTERM while training, when everything is saved.
    """
    if engine not in ("local", "ray"):
        raise ConfigError(f"engine is '{engine}'; allowed: local, ray.")
    known = list(dict.fromkeys(point.label for point in sweep.points))
    for label in only:
        if label not in known:
            raise ConfigError(unknown_name("label", label, known))
    folder = Path(output)
    places = [
        PointFolder(point, folder / "points" / point.name)
        for point in sweep.points
        if not only or point.label in only
    ]
    _require_possible(places)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SWEEP_FILE).write_text(to_yaml(sweep.mapping), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Output folder '{folder}' cannot be written: {error}") from error
    streams = [s for s in streams_of(places, folder, sweep.eval_tokens) if s.missing()]
    try:
        if streams and engine == "ray":
            from .ray import run_points

            with contextlib.ExitStack() as locks:
                for stream in streams:
                    locks.enter_context(stream.to_itself())
                run_points([place for place in places if place.missing], sweep.eval_tokens)
        else:
            for stream in streams:
                with stream.to_itself():
                    stream.run()
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, GO_ON) from None
    return [place.outcome() for place in places]


def _require_possible(places: Sequence[PointFolder]) -> None:
    """Raise ConfigError for what would fail only when it is a point's turn."""
    for place in places:
        place.require_same()
        runner = place.point.config.runner
        used = [name for name in _NOT_IN_STREAMS if getattr(runner, name)]
        if used:
            raise ConfigError(f"{', '.join(used)} cannot be used in a sweep; use 'train'.")
    for dataset in {place.point.config.runner.dataset_path for place in places}:
        open_text(dataset, "train")
