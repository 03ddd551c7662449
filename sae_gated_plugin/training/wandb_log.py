"""What SAELens tells wandb: after the disk has it, under a name that wandb takes, and harmless.

SAELens logs, evaluates for the log and uploads in the middle of its loop and between its files,
where an exception ends the training and takes the files with it. Here what fails is a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Generator
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import wandb
from sae_lens.config import LoggingConfig

from ..errors import ConfigError, first_line

logger = logging.getLogger("sae_gated_plugin")

#: Characters of an artifact's name, less those of what SAELens puts behind it.
LONGEST_NAME = 128 - len("_log_feature_sparsity")


class Run(Protocol):
    """A runner of SAELens's, and how far it is."""

    cfg: Any
    begun: bool
    saved: bool


def artifact_name(name: str) -> str:
    """Return a name that wandb takes; two names stay two."""
    allowed = re.sub(r"[^A-Za-z0-9_.-]", "_", name.replace("/", "__"))
    if allowed == name.replace("/", "__") and len(allowed) <= LONGEST_NAME:
        return allowed
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"sae_{digest}_{allowed[-(LONGEST_NAME - 13) :]}"


def harmless(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call whose exceptions are warnings, of which the first of each kind is given."""
    said: set[str] = set()

    @wraps(call)
    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if type(error).__name__ not in said:
                logger.warning("wandb is missing something (%s); all goes on.", first_line(error))
            said.add(type(error).__name__)

    return attempt


def shield(trainer: Any) -> None:
    """Make harmless what a trainer of SAELens's logs in its loop. To be called in a wandb run."""
    for name in ("_log_train_step", "_run_and_log_evals"):
        setattr(trainer, name, harmless(getattr(trainer, name)))
    if wandb.run is not None:
        wandb.log = harmless(wandb.run.log)  # wandb itself puts the run's method there


def finish(**options: Any) -> None:
    """End a wandb run, if there is one."""
    if wandb.run is not None:
        harmless(wandb.finish)(**options)


class Uploads:
    """Stands in for a LoggingConfig's `log`: what SAELens uploads waits until it is in place."""

    def __init__(self, logging_config: LoggingConfig):
        self._upload = harmless(partial(type(logging_config).log, logging_config))
        self._waiting: list[tuple[Any, list[Any], dict[str, Any]]] = []
        logging_config.log = self._wait  # type: ignore[method-assign]

    def _wait(self, trainer: Any, *files: Any, **named: Any) -> None:
        self._waiting.append((trainer, list(files), named))

    def forget(self) -> None:
        """Upload nothing of what waits: it was not written."""
        self._waiting.clear()

    def send(self, folder: Path | None = None) -> None:
        """Upload what waits. folder: where the files are now, default where they were."""

        def moved(file: Any) -> Any:
            return file if folder is None or file is None else folder / Path(file).name

        waiting, self._waiting = self._waiting, []
        for trainer, files, named in waiting:
            name = artifact_name(trainer.sae.get_name())
            sae = SimpleNamespace(get_name=lambda name=name: name)
            named["sparsity_path"] = moved(named.get("sparsity_path"))
            self._upload(SimpleNamespace(sae=sae, cfg=trainer.cfg), *map(moved, files), **named)


@contextlib.contextmanager
def around(run: Run, how_to_go_on: str) -> Generator[None]:
    """Say of an exception of SAELens's `run` that it is wandb's, where it can only be.

    Raises ConfigError where wandb does not start. When the SAE is saved it is a warning.
    """
    try:
        yield
    except Exception as error:
        if run.saved:
            logger.warning("wandb could not be told of the end: %s", first_line(error))
        elif run.cfg.logger.log_to_wandb and not run.begun and wandb.run is None:
            raise ConfigError(
                f"wandb cannot start: {first_line(error)} Nothing was trained. Set "
                f"logger.log_to_wandb=false, or WANDB_MODE=offline; {how_to_go_on}"
            ) from error
        else:
            raise
