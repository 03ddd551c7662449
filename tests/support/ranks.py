"""Several ranks on this machine, forked, so that they need not import; gloo between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.process import Process


def on_ranks(size: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns on each of `size` ranks, which see one process group."""
    folder.mkdir(parents=True, exist_ok=True)
    pids = [_fork(rank, size, work, folder) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    logs = "\n".join((folder / f"log{rank}").read_text() for rank in range(size))
    assert codes == [0] * size, f"{codes}\n{logs}"
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(size)]


def _fork(rank: int, size: int, work: Callable[[int], Any], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    log = (folder / f"log{rank}").open("w")
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        torch.save(work(rank), folder / f"result{rank}")
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc(file=log)
    finally:
        log.flush()
        os._exit(code)


def forked(
    size: int,
    *arguments: str | Path,
    folder: Path,
    own: Callable[[int], list[str]] = lambda rank: [],
) -> list[Process]:
    """`sae-gated` on ranks that find each other as torchrun's do, without its agent.

    own: arguments that only a rank has.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)

    def environment(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )

    return [
        Process(
            *arguments,
            *own(rank),
            log=folder / f"log{rank}",
            before=partial(environment, rank),
        )
        for rank in range(size)
    ]


class Torchrun:
    """The real one, in a process group of its own, for `train`.

    stopped: a rank, a step and a signal, as `stopped_rank.py` has them.
    """

    def __init__(
        self,
        size: int,
        *arguments: str | Path,
        log: Path,
        options: tuple[str, ...] = (),
        stopped: tuple[str, str, str] | None = None,
    ):
        self._log = log
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *options]
        script = str(Path(__file__).with_name("stopped_rank.py"))
        package = [script, *stopped] if stopped else ["-m", "sae_gated_plugin"]
        command = [*torchrun, *package, "train", *map(str, arguments)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def ranks(self) -> list[int]:
        """The ids of the processes that torchrun has started and that run."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")
