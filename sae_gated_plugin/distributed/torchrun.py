"""What torchrun tells a process by its environment; no PyTorch is loaded to read it."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import cache
from typing import Any

from ..errors import ConfigError

#: Seconds for which a process waits for the others, and the variable that says otherwise. What they
#: wait for longest is a checkpoint that rank 0 writes: of 1 M latents × 4096 it has 100 GB, eight
#: minutes at 200 MB/s. (Each batch of the language model is exchanged; the evaluation is waited for
#: by none.) PyTorch's own are 30 minutes for gloo and 10 for NCCL.
PATIENCE, PATIENCE_VARIABLE = 1200, "SAE_GATED_RANK_TIMEOUT"


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0


def size() -> int:
    """How many processes were started together; 1 without torchrun."""
    return max(1, _number("WORLD_SIZE")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is."""
    return _number("RANK") if size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine."""
    return _number("LOCAL_RANK")


def restarts() -> int:
    """How many times torchrun has started them again, because one had ended."""
    return _number("TORCHELASTIC_RESTART_COUNT")


def patience() -> timedelta:
    """How long to wait for another process before it counts as lost."""
    seconds = os.environ.get(PATIENCE_VARIABLE, "")
    if seconds and not _number(PATIENCE_VARIABLE):
        raise ConfigError(
            f"{PATIENCE_VARIABLE} is '{seconds}'; it is the number of seconds to wait for another "
            f"process, a whole one above 0; {PATIENCE} where it is not set."
        )
    return timedelta(seconds=_number(PATIENCE_VARIABLE) or PATIENCE)


def require_one(command: str) -> None:
    """Raise ConfigError where several processes were started for what one can do."""
    if size() > 1:
        raise ConfigError(
            f"{size()} processes were started for '{command}', which is done by one; torchrun is "
            "for train. Start it without."
        )


@cache
def store() -> Any:
    """The key-value store of these processes, of those that torchrun has started last.

    torchrun may go on with one store after a restart, in which the addresses of the dead still are.
    """
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    found, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"attempt {restarts()}", found)


@cache
def speaks() -> bool:
    """Whether this process is the first to fail, whose sentence is the one to be shown."""
    if size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        first = store().add("the first to fail", 1) == 1
    except (RuntimeError, StopIteration):
        return True
    if not first:
        time.sleep(1)  # torchrun ends the others as soon as one has ended
    return first
