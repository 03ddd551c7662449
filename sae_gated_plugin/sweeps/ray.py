"""Sweeps on a Ray cluster: each point is a task, trained by itself wherever there is room.

Ray schedules, and retries the tasks of workers that died. A task sends its files back and the
driver alone writes the sweep's folder, so no shared file system is needed and no point can arrive
twice. Relative paths of models and text are looked up in the driver's working directory, where the
worker has one of that name.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_WEIGHTS_FILENAME

from ..errors import ConfigError, one_line
from ..files import write_json
from ..measure.evaluate import evaluate
from ..training.run import train
from ..training.run_folder import RESULTS_FILE, RUN_FILE, evaluation_tokens
from .folder import FAILED_FILE, is_trained, point_folder, sentence, write_failure, write_point
from .grid import Point


def train_alone(point: Point, eval_tokens: int | None, folder: Path) -> dict[str, Any]:
    """Train and measure one point by itself in `folder`; return its results or its failure.

    Where the folder holds the trained SAE already, it is measured only.
    """
    cfg = point.config.runner
    try:
        if not (folder / SAE_WEIGHTS_FILENAME).exists():
            results = train(point.config, folder, eval_tokens=eval_tokens)
        else:
            results = evaluate(
                folder,
                tokens=eval_tokens or evaluation_tokens(cfg),
                device=cfg.device,
                trust_model_options=True,  # they are the configuration's
            )
        return {**point.about(), **results}
    except Exception as error:
        return {"error": sentence(error)}


#: How often a point is started again after its worker died.
RETRIES = 5


def run_points(points: list[Point], folder: Path, eval_tokens: int | None) -> None:
    """Train every point as a Ray task and write each one's folder as it arrives.

    Raises ConfigError where Ray is not installed or its cluster cannot be reached.
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
        gpus = 1 if any(p.config.runner.device.startswith("cuda") for p in points) else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_train)
        waiting: dict[Any, Point] = {
            task.remote(point, eval_tokens, os.getcwd(), _trained(point, folder)): point
            for point in points
        }
        while waiting:
            for done in ray.wait(list(waiting), num_returns=1)[0]:
                _write(done, waiting.pop(done), folder, ray)
    finally:
        if started_here:
            ray.shutdown()


def _trained(point: Point, folder: Path) -> dict[str, bytes]:
    """The files of an SAE that was trained before and only has to be measured."""
    if not is_trained(folder, point):
        return {}
    return _read(point_folder(folder, point))


def _read(folder: Path) -> dict[str, bytes]:
    skipped = (RUN_FILE, RESULTS_FILE, FAILED_FILE)  # they name the folder, or are out of date
    written = folder.iterdir() if folder.exists() else ()
    return {p.name: p.read_bytes() for p in written if p.is_file() and p.name not in skipped}


def _write(done: Any, point: Point, folder: Path, ray: Any) -> None:
    try:
        results, files = ray.get(done)
    except Exception as error:  # a task that failed for good, its own error or its workers' deaths
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        write_failure(folder, point, one_line(last))
        return
    if "error" in results:
        write_failure(folder, point, results["error"], files)
        return
    results["path"] = str(point_folder(folder, point))

    def fill(new: Path) -> None:
        for name, content in files.items():
            (new / name).write_bytes(content)
        write_json(new / RESULTS_FILE, results)

    write_point(folder, point, fill)


def _train(
    point: Point, eval_tokens: int | None, directory: str, trained: dict[str, bytes]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """In the worker: train in a temporary folder; return the results and the files.

    trained: the files of an SAE to measure instead.
    """
    if os.path.isdir(directory):
        os.chdir(directory)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        for name, content in trained.items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        results = train_alone(point, eval_tokens, folder)
        return results, _read(folder)
