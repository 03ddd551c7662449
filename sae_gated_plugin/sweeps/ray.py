"""Sweeps on a Ray cluster: each point is a task, a run of its own wherever there is room.

Ray schedules, and retries the tasks of workers that died. A task sends its files back and the
driver alone writes the sweep's folder, so no shared file system is needed and no point can arrive
twice. Relative paths of models and text are looked up in the driver's working directory, where the
worker has one of that name.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, one_line
from ..training.run import resume, train
from ..training.run_folder import RESULTS_FILE
from .folder import PointFolder, read_files, sentence, write_files
from .grid import Point

#: How often a point is started again after its worker died.
RETRIES = 5

Files = dict[str, bytes]


def run_points(
    places: Sequence[PointFolder], eval_tokens: int | None, fused_adam: bool | None = None
) -> None:
    """Train every point as a Ray task and write each one's folder as it arrives.

    One that is trained is measured only. Raises ConfigError where Ray is not installed or its
    cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "engine 'ray' needs Ray; install it with `pip install 'sae-gated-plugin[ray]'`."
        ) from None
    started_here = not ray.is_initialized()
    if started_here:
        try:
            ray.init(log_to_driver=False, ignore_reinit_error=True)
        except Exception as error:
            raise ConfigError(f"The Ray cluster cannot be reached: {error}") from error
    try:
        gpus = 1 if any(p.point.config.runner.device.startswith("cuda") for p in places) else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_train)
        waiting: dict[Any, PointFolder] = {}
        for place in places:
            trained = read_files(place.path) if place.trained else {}
            given = (place.point, eval_tokens, fused_adam, os.getcwd(), trained)
            waiting[task.remote(*given)] = place
        while waiting:
            for done in ray.wait(list(waiting))[0]:
                place = waiting.pop(done)
                try:
                    error, files = ray.get(done)
                except Exception as lost:  # the task failed for good: itself, or all its workers
                    last = (str(lost).strip() or type(lost).__name__).splitlines()[-1]
                    error, files = one_line(last), {}
                _write(place, error, files)
    finally:
        if started_here:
            ray.shutdown()


def _train(
    point: Point,
    eval_tokens: int | None,
    fused_adam: bool | None,
    directory: str,
    trained: Files,
) -> tuple[str | None, Files]:
    """In the worker: train in a temporary folder; return why that failed, if it did, and the files.

    trained: the files of an SAE to measure instead.
    """
    if os.path.isdir(directory):
        os.chdir(directory)
    with tempfile.TemporaryDirectory() as temporary:
        folder, error = Path(temporary) / "run", None
        try:
            if trained:
                folder.mkdir()
                write_files(folder, trained)
                resume(folder, eval_tokens=eval_tokens)
            else:
                train(point.config, folder, eval_tokens=eval_tokens, fused_adam=fused_adam)
        except Exception as failed:
            error = sentence(failed)
        return error, read_files(folder)


def _write(place: PointFolder, error: str | None, files: Files) -> None:
    results = files.pop(RESULTS_FILE, b"{}")
    if error is not None:
        return place.write_failure(error, files)

    def fill(new: Path) -> None:
        write_files(new, files)
        place.write_results(json.loads(results), new)

    place.write(fill)
