"""What SAELens tells wandb: after the disk has it, under a name that wandb takes, and harmless.

SAELens logs, evaluates for the log and uploads in the middle of its loop and between its files,
where an exception ends the training and takes the files with it. Here what fails is a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Generator, Mapping
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import wandb
from sae_lens.config import LoggingConfig
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from ..errors import ConfigError, first_line
from ..files import read_json
from ..plugins.bridge import registry
from ..results import MEASURES
from ..saelens_internals import (
    keep_wandb_running,
    log_reached_coefficient,
    shield_logging,
    take_uploads,
)

logger = logging.getLogger("sae_gated_plugin")

#: Characters of an artifact's name, less those of what SAELens puts behind it.
LONGEST_NAME = 128 - len("_log_feature_sparsity")


def artifact_name(name: str) -> str:
    """Return a name that wandb takes; two names stay two."""
    plain = name.replace("/", "__")
    allowed = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)
    if allowed == plain and len(allowed) <= LONGEST_NAME:
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
    shield_logging(trainer, harmless)
    for single in getattr(trainer, "trainers", {"": trainer}).values():
        log_reached_coefficient(single)
    if wandb.run is not None:
        wandb.log = harmless(wandb.run.log)  # wandb itself puts the run's method there


def require_login(logging_config: LoggingConfig) -> None:
    """Let wandb ask for a login where it needs one. Raises ConfigError where it gets none."""
    try:
        if logging_config.log_to_wandb:
            wandb.login()
    except Exception as error:  # wandb has several kinds for it
        raise ConfigError(
            f"wandb has no login here: {first_line(error)} Give one with 'wandb login', keep the "
            "log on the disk with WANDB_MODE=offline, or do without: logger.log_to_wandb=false"
        ) from error


@contextlib.contextmanager
def until_measured(config: LoggingConfig) -> Generator[None]:
    """End the wandb run, if there is one, when this ends; `around` keeps SAELens from doing it."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if config.log_to_wandb and wandb.run is not None:
            harmless(wandb.finish)(exit_code=exit_code)


def remember_run(config: LoggingConfig) -> None:
    """Let the configuration, which is saved with the SAE, name the wandb run; `reopen` reads it."""
    if config.log_to_wandb and wandb.run is not None:
        config.wandb_id = wandb.run.id


def reopen(config: LoggingConfig, folder: Path) -> None:
    """Open the wandb run in which a folder's SAE was trained, by a process that has ended since."""

    def attempt() -> None:
        run_id = read_json(folder / RUNNER_CFG_FILENAME)["logger"]["wandb_id"]
        if run_id:  # version 0.1 recorded none
            project, entity = config.wandb_project, config.wandb_entity
            wandb.init(project=project, entity=entity, id=run_id, resume="allow")

    if config.log_to_wandb:
        harmless(attempt)()


def summarize(config: LoggingConfig, results: Mapping[str, Any], prefix: str = "") -> None:
    """Put what was measured on held-out text into the run's summary, by which runs are ranked.

    prefix: the SAE's in a run of many, as SAELens has it before what it logs.
    """
    summary: dict[str, Any] = {}
    for key in (*MEASURES, *registry().measures):
        low, high = results.get(f"{key}_ci") or (None, None)
        summary |= {key: results.get(key), f"{key}_low": low, f"{key}_high": high}
    summary = {f"{prefix}held_out/{k}": v for k, v in summary.items() if v is not None}
    if config.log_to_wandb and (run := wandb.run) is not None:
        harmless(lambda: run.summary.update(summary))()


def uploader(config: LoggingConfig) -> Callable[..., None]:
    """Keep SAELens from uploading; return `upload(trainer, folder, aliases)`, to be called when the
    files of the trainer's SAE are in their folder.
    """
    log = take_uploads(config)

    def upload(trainer: Any, folder: Path, aliases: list[str] | None = None) -> None:
        if config.log_to_wandb:
            sae = SimpleNamespace(get_name=partial(artifact_name, trainer.sae.get_name()))
            files = [folder / name for name in (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME)]
            named = SimpleNamespace(sae=sae, cfg=trainer.cfg)
            log(named, *files, sparsity_path=folder / SPARSITY_FILENAME, wandb_aliases=aliases)

    return harmless(upload)


@contextlib.contextmanager
def around(run: Any, how_to_go_on: str) -> Generator[None]:
    """Say of an exception of a runner of SAELens's that it is wandb's, where it can only be.

    run.begun, run.saved: how far it is. Raises ConfigError where wandb does not start. When the
    SAE is saved it is a warning.
    """
    try:
        with keep_wandb_running():
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
