"""A sweep's folder: points, failures and what is missing."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_WEIGHTS_FILENAME

from ..config.run import RunConfig, load_config
from ..errors import ConfigError, SaeGatedError, first_line
from ..files import write_json
from ..saelens_internals import InterruptedException
from ..training.checkpoints import obey_umask
from ..training.run_folder import RESULTS_FILE, RUN_FILE
from .grid import Point

logger = logging.getLogger("sae_gated_plugin")

FAILED_FILE = "failed.json"
SWEEP_FILE = "sweep.yaml"


def point_folder(folder: Path, point: Point) -> Path:
    """Where a point's files are, once it is trained or has failed."""
    return folder / "points" / point.name


def outcome_of(folder: Path, point: Point) -> dict[str, Any] | None:
    """What is known of a point: its results or its failure; None if it is missing."""
    for name in (RESULTS_FILE, FAILED_FILE):
        path = point_folder(folder, point) / name
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def missing_points(folder: Path, points: Sequence[Point]) -> list[Point]:
    """Points without results, but for those that failed before there was an SAE to measure."""
    missing: list[Point] = []
    for point in points:
        path = point_folder(folder, point)
        given_up = (path / FAILED_FILE).exists() and not is_trained(folder, point)
        if not given_up and not (path / RESULTS_FILE).exists():
            missing.append(point)
    return missing


def require_same(point: Point, folder: Path) -> None:
    """Raise ConfigError if a point's folder is of another configuration."""
    path = point_folder(folder, point) / RUN_FILE
    if not path.exists() or path.read_text(encoding="utf-8") == point.config.to_yaml():
        return
    if _values(load_config(path)) != _values(point.config):
        raise ConfigError(
            f"'{path.parent}' was trained with another configuration than this sweep's; nothing "
            "was changed. Choose another --output, or delete that folder to train it again."
        )


def _values(config: RunConfig) -> dict[str, Any]:
    """What a configuration says, however its YAML is written; without where its folder lies."""
    values = json.loads(json.dumps(config.runner.to_dict(), default=str))
    return {k: v for k, v in values.items() if k not in ("output_path", "checkpoint_path")}


def is_trained(folder: Path, point: Point) -> bool:
    """Whether the point's SAE is there, measured or not."""
    return (point_folder(folder, point) / SAE_WEIGHTS_FILENAME).exists()


def write_point(folder: Path, point: Point, fill: Callable[[Path], None]) -> None:
    """Create a point's folder whole or not at all; `fill(path)` writes into it.

    An SAE that is there already stays, but one without results gives way to one that has them.
    """
    target = point_folder(folder, point)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
        new = Path(temporary) / "point"
        new.mkdir()
        (new / RUN_FILE).write_text(point.config.to_yaml(), encoding="utf-8")
        fill(new)
        obey_umask(new)
        measured = (new / RESULTS_FILE).exists()
        if measured and target.exists() and not (target / RESULTS_FILE).exists():
            target.rename(Path(temporary) / "unmeasured")
        if not target.exists():  # otherwise another process was first
            new.rename(target)


def write_failure(
    folder: Path, point: Point, error: str, files: Mapping[str, bytes] | None = None
) -> None:
    """Record that a point failed; an SAE that it has stays.

    error: why, a sentence. files: what there is of the SAE, where it was trained elsewhere.
    """
    architecture = point.config.runner.sae.architecture()
    record = {**point.about(), "architecture": architecture, "error": error}

    def fill(new: Path) -> None:
        for name, content in (files or {}).items():
            (new / name).write_bytes(content)
        write_json(new / FAILED_FILE, record)

    if is_trained(folder, point):
        write_json(point_folder(folder, point) / FAILED_FILE, record)
    else:
        write_point(folder, point, fill)


def sentence(error: Exception) -> str:
    """What an error says, with its name where it is not one of ours."""
    return str(error) if isinstance(error, SaeGatedError) else first_line(error)


@contextlib.contextmanager
def noting(failed: dict[str, str], name: str, *but: type[Exception]) -> Generator[None]:
    """Note an exception as this point's failure. but: what is not this point's, and stops all."""
    try:
        yield
    except (InterruptedException, *but):
        raise
    except Exception as error:
        failed[name] = sentence(error)
        logger.warning("'%s' has failed, the others go on: %s", name, failed[name])
