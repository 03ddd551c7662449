"""Several ranks on this machine, forked, so that they need not import; gloo between them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


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
