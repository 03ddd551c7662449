"""The processes that torchrun started: joining them, agreeing with them, speaking for them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, Interrupted, SaeGatedError, first_line
from . import torchrun

T = TypeVar("T")


class RankLost(SaeGatedError):
    """Another process of the training ended, or cannot be reached any more."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default there is no other.

    Every method must be called by all of them, in the same order. restarts: how many times torchrun
    has started them again.
    """

    rank: int = 0
    size: int = 1
    restarts: int = 0

    def first(self, action: Callable[[], T]) -> T:
        """Let rank 0 act; return what it returns, or raise what it raises, on every rank.

        Raised so on all are errors of this package and interrupts; what it returns must pickle.
        """
        if self.size == 1:
            return action()
        said: list[Any] = [None, None]
        try:
            if self.rank == 0:
                said[0] = action()
        except (SaeGatedError, Interrupted) as error:
            said[1] = error
        dist.broadcast_object_list(said, 0)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def leave(self) -> None:
        """Go on alone, as all ranks then do."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def in_turn(self, action: Callable[[], T]) -> T:
        """What `action` returns, done by one rank after the other: they share a host's memory."""
        made: list[T] = []
        failed: SaeGatedError | None = None
        for rank in range(self.size):
            try:
                if rank == self.rank:
                    made.append(action())
            except SaeGatedError as error:
                failed = error  # if it is everybody's, all come to it
            self.largest(0)  # a barrier that needs no GPU
        if failed is not None:
            raise failed
        return made[0]

    def in_parts(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`function` of rows (n, ...), each rank computing its share of them; all have all of it.

        What it returns must have as many rows as it was given.
        """
        if self.size == 1:
            return function(rows)
        parts = rows.tensor_split(self.size)
        own, most = parts[self.rank], max(len(part) for part in parts)
        computed = function(own if len(own) else rows[:1])[: len(own)]
        padded = computed.new_zeros(most, *computed.shape[1:])
        padded[: len(own)] = computed
        found = [torch.empty_like(padded) for _ in parts]
        dist.all_gather(found, padded)
        return torch.cat([some[: len(part)] for some, part in zip(found, parts)])

    def require_alike(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError, on all ranks, where any has other facts than rank 0."""
        if self.size == 1:
            return
        all_facts: list[Any] = [None] * self.size
        dist.all_gather_object(all_facts, dict(_flat(facts)))
        here = all_facts[0]
        for rank, there in enumerate(all_facts):
            other = [
                f"{name} is {here.get(name)!r} on rank 0 and {there.get(name)!r} on rank {rank}"
                for name in {**here, **there}
                if here.get(name) != there.get(name)
            ]
            if other:
                raise ConfigError(
                    f"The {self.size} processes were not started alike: {'; '.join(other[:5])}. "
                    "Nothing was changed; start all with the same configuration and versions."
                )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Generator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


@contextmanager
def joined() -> Generator[Ranks]:
    """Join the processes that this one was started with, and leave them in the end.

    Tensors on GPUs go by NCCL, all others by gloo. Raises ConfigError where there are too few GPUs,
    and RankLost in whatever waits for a process that has ended, or that does not answer for
    `torchrun.PATIENCE` seconds, 20 minutes, or as many as SAE_GATED_RANK_TIMEOUT says. (With NCCL
    such a process's peers are aborted by PyTorch, whose message it then is.)
    """
    if torchrun.size() == 1:
        yield Ranks(restarts=torchrun.restarts())
        return
    cuda = torch.cuda.is_available()
    if cuda:
        n_gpus = torch.cuda.device_count()
        if torchrun.local_rank() >= n_gpus:
            raise ConfigError(
                f"{torchrun.local_rank() + 1} processes or more were started here, and there are "
                f"{n_gpus} GPUs; start one for each: torchrun --nproc-per-node {n_gpus}"
            )
        torch.cuda.set_device(torchrun.local_rank())
    if torchrun.rank():  # what all would say, rank 0 says
        for name in ("sae_gated_plugin", "sae_lens"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        os.environ["WANDB_MODE"] = "disabled"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=torchrun.store(),
            rank=torchrun.rank(),
            world_size=torchrun.size(),
            timeout=torchrun.patience(),
        )
        ranks = Ranks(torchrun.rank(), torchrun.size(), torchrun.restarts())
        yield ranks
        ranks.leave()
    except (RuntimeError, dist.DistError) as error:
        if is_loss(error):
            raise RankLost(loss(torchrun.size(), error)) from error
        raise


def is_loss(error: Exception) -> bool:
    """Whether an exception says that another process has ended, or cannot be reached."""
    return isinstance(error, dist.DistError) or any(
        name in str(error) for name in ("gloo", "NCCL", "ncclRemoteError")
    )


def loss(size: int, error: Exception) -> str:
    """That, in a sentence."""
    if "timed out" in str(error).lower():
        seconds = torchrun.patience().total_seconds()
        return (
            f"Another of the {size} processes has not answered for {seconds:g} s, so this one "
            f"stopped; where it is slow and not stuck, set {torchrun.PATIENCE_VARIABLE} to more."
        )
    return (
        f"Another of the {size} processes has ended, or cannot be reached "
        f"({first_line(error)}), so this one stopped."
    )
