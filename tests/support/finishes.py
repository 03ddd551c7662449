"""What can happen to a process between the last step of its training and its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

KINDS = ("SIGKILL", "SIGTERM", "full disk", "failing logger")
#: Exit codes; a process may have ended before its turn.
ALLOWED = {
    "SIGKILL": (0, -9),
    "SIGTERM": (0, 143, -15),
    "full disk": (0, 2),
    "failing logger": (0,),
}


def after_the_last_step(trainer: Any, *actions: Callable[[], Any]) -> Callable[[], None]:
    """What a process is to do first, so that it does `actions` when its training is done.

    trainer: SAELens's class of it.
    """

    def before() -> None:
        fit = trainer.fit

        def fit_and_act(self: Any) -> Any:
            trained = fit(self)
            for action in actions:
                action()
            return trained

        trainer.fit = fit_and_act

    return before


def fail_wandb() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.CommError("the server is gone")

    for name in ("log", "log_artifact", "finish"):
        setattr(wandb.Run, name, fail)


def fill_up(disk: Path) -> Path:
    """Leave no room; return the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler
