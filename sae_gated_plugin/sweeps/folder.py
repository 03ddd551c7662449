"""A sweep's folder: points, failures and what is missing."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors import SafetensorError

from ..errors import ArtifactError, ConfigError, SaeGatedError, first_line
from ..files import HIDDEN, read_json, write_json
from ..saelens_internals import InterruptedException
from ..training.checkpoints import obey_umask
from ..training.run_folder import RESULTS_FILE, RUN_FILE
from .grid import Point

logger = logging.getLogger("sae_gated_plugin")

FAILED_FILE = "failed.json"
SWEEP_FILE = "sweep.yaml"


@dataclass(frozen=True)
class PointFolder:
    """A point, and the folder that it has once it is trained or has failed."""

    point: Point
    path: Path

    @property
    def trained(self) -> bool:
        """Whether the SAE is there, measured or not."""
        return (self.path / SAE_WEIGHTS_FILENAME).exists()

    @property
    def failed(self) -> bool:
        """Whether the point has failed before there was an SAE: it is not tried again."""
        return (self.path / FAILED_FILE).exists() and not self.trained

    @property
    def missing(self) -> bool:
        """Whether there is something left to do."""
        return not self.failed and not (self.path / RESULTS_FILE).exists()

    def outcome(self) -> dict[str, Any]:
        """The point, with its results or its failure, if it has either."""
        for name in (RESULTS_FILE, FAILED_FILE):
            if (self.path / name).exists():
                return {**self.point.about(), **read_json(self.path / name)}
        return self.point.about()

    def require_same(self) -> None:
        """Raise ConfigError if the folder is of another configuration."""
        file, config = self.path / RUN_FILE, self.point.config
        if not file.exists() or file.read_text(encoding="utf-8") == config.to_yaml():
            return
        if config.load(file).values() != config.values():
            raise ConfigError(
                f"'{self.path}' was trained with another configuration than this sweep's; nothing "
                "was changed. Choose another --output, or delete that folder to train it again."
            )

    def write(self, fill: Callable[[Path], Any]) -> None:
        """Create the folder whole or not at all; `fill(path)` writes into it.

        A folder that is there stays, but an SAE without results gives way to one that has them.
        Raises ArtifactError where the disk refuses.
        """
        with disk_errors(f"'{self.path}'"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=HIDDEN) as temporary:
                new = Path(temporary) / "new"
                new.mkdir()
                fill(new)
                (new / RUN_FILE).write_text(self.point.config.to_yaml(), encoding="utf-8")
                obey_umask(new)
                measured = (new / RESULTS_FILE).exists()
                if measured and self.path.exists() and not (self.path / RESULTS_FILE).exists():
                    self.path.rename(Path(temporary) / "unmeasured")
                if not self.path.exists():  # otherwise another process was first
                    new.rename(self.path)

    def write_results(self, results: Mapping[str, Any], folder: Path | None = None) -> None:
        """Record what was measured. folder: where the files are for now, default in their place."""
        folder = folder or self.path
        record = {**self.point.about(), **results, "path": str(self.path)}
        write_json(folder / RESULTS_FILE, record)
        (folder / FAILED_FILE).unlink(missing_ok=True)

    def write_failure(self, error: str, files: Mapping[str, bytes] | None = None) -> None:
        """Record that the point failed; an SAE that it has stays.

        error: why, a sentence. files: what there is of the SAE, where it was trained elsewhere.
        """
        architecture = self.point.config.runner.sae.architecture()
        record = {**self.point.about(), "architecture": architecture, "error": error}

        def fill(new: Path) -> None:
            write_files(new, files or {})
            write_json(new / FAILED_FILE, record)

        if self.trained:
            write_json(self.path / FAILED_FILE, record)
        else:
            self.write(fill)

    @contextlib.contextmanager
    def isolated(self) -> Generator[None]:
        """Record an exception as this point's failure; signals and a full disk are nobody's."""
        try:
            yield
        except (InterruptedException, ArtifactError):
            raise
        except Exception as error:
            self.write_failure(sentence(error))
            logger.warning(
                "'%s' has failed, the others go on: %s", self.point.name, sentence(error)
            )


@contextlib.contextmanager
def disk_errors(what: str, *others: type[Exception]) -> Generator[None]:
    """Turn what a disk refuses into an ArtifactError. others: how else that may be said."""
    try:
        yield
    except (OSError, SafetensorError, *others) as error:
        raise ArtifactError(f"{what} cannot be written: {first_line(error)}.") from error


def read_files(folder: Path) -> dict[str, bytes]:
    """A folder's files by name, those of its folders left out."""
    return {file.name: file.read_bytes() for file in folder.glob("*") if file.is_file()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


def sentence(error: Exception) -> str:
    """What an error says, with its name where it is not one of ours."""
    return str(error) if isinstance(error, SaeGatedError) else first_line(error)
