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
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.yaml import to_yaml
from ..errors import ConfigError, Interrupted, unknown_name
from ..model.text import open_text
from ..training.fine_tuning import starting_sae
from .folder import SWEEP_FILE, PointFolder
from .grid import Sweep
from .stream import GO_ON, Stream, streams_of

_NOT_IN_STREAMS = ("use_cached_activations", "compile_sae")


def run_sweep(
    sweep: Sweep,
    output: str | Path,
    engine: str = "local",
    only: Sequence[str] = (),
    fused_adam: bool | None = None,
) -> list[dict[str, Any]]:
    """Train and measure what is not there yet; return the results of all points, failed ones too.

    output: the sweep's folder. engine: "local", or "ray" for the cluster that `RAY_ADDRESS` names
    (a local one where it names none). only: labels of the curves to do this time, default all.
    fused_adam: as of `train`.
    A point that fails is recorded and the others go on; to try it again, delete its folder. One
    that is trained and could not be measured is measured again without that.
    Raises ConfigError for a folder that holds another sweep's points, Interrupted on SIGINT, and on
    SIGTERM while training, when everything is saved.
    """
    if engine not in ("local", "ray"):
        raise ConfigError(f"engine is '{engine}'; allowed: local, ray.")
    folder = Path(output)
    places = places_of(sweep, folder / "points", only)
    _require_possible(places)
    write_file(folder / SWEEP_FILE, sweep.mapping)
    streams = streams_of(places, folder, sweep.eval_tokens)
    if engine == "local":
        run_streams(streams, fused_adam)
    elif any(place.missing for place in places):
        from .ray import run_points

        with contextlib.ExitStack() as locks, _interruptible():
            for stream in [stream for stream in streams if stream.missing()]:
                locks.enter_context(stream.to_itself())
            missing = [place for place in places if place.missing]
            run_points(missing, sweep.eval_tokens, fused_adam)
    return [place.outcome() for place in places]


def places_of(sweep: Sweep, folder: Path, only: Sequence[str] = ()) -> list[PointFolder]:
    """The folders of a sweep's points. Raises ConfigError for labels in `only` that it has not."""
    known = list(dict.fromkeys(point.label for point in sweep.points))
    for label in only:
        if label not in known:
            raise ConfigError(unknown_name("label", label, known))
    chosen = [point for point in sweep.points if not only or point.label in only]
    places = [PointFolder(point, folder / point.name) for point in chosen]
    for place in places:
        place.require_same()
    return places


def write_file(file: Path, mapping: Mapping[str, Any]) -> None:
    """Make a sweep's folder, and write what it was started with."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(mapping), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Output folder '{file.parent}' cannot be written: {error}") from error


def run_streams(streams: Sequence[Stream], fused_adam: bool | None = None) -> None:
    """Do what is missing of each stream, one after another. Raises Interrupted."""
    with _interruptible():
        for stream in [stream for stream in streams if stream.missing()]:
            stream.fused_adam = fused_adam
            with stream.to_itself():
                stream.run()


@contextlib.contextmanager
def _interruptible() -> Generator[None]:
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, GO_ON) from None


def _require_possible(places: Sequence[PointFolder]) -> None:
    """Raise ConfigError for what would fail only when it is a point's turn."""
    for place in places:
        runner = place.point.config.runner
        used = [name for name in _NOT_IN_STREAMS if getattr(runner, name)]
        if used:
            raise ConfigError(f"{', '.join(used)} cannot be used in a sweep; use 'train'.")
        starting_sae(runner, weights=place.missing and not place.trained)
    for dataset in {place.point.config.runner.dataset_path for place in places}:
        open_text(dataset, "train")
