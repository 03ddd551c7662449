"""`sae-gated` in a process of its own that can be killed: forked, so that it need not import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sae_gated_plugin.cli.commands import main

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork


class Process:
    """A process that runs the command line; `before` is called in it first."""

    def __init__(
        self, *arguments: str | Path, log: Path, before: Callable[[], None] = lambda: None
    ):
        self.log = log
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                sys.stderr = os.fdopen(2, "w", closefd=False)
                sys.argv = ["sae-gated", *map(str, arguments)]
                # torch replaces the thread pool that the fork lost when it is first asked for it,
                # and fails if several threads ask at once, as those that load weights do.
                torch.set_num_threads(torch.get_num_threads())
                before()
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            finally:
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def runs(self) -> bool:
        """Whether it has not ended by itself."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self) -> int:
        """The exit code; minus the signal's number for a killed process."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def wait_for(self, path: Path, seconds: float = 120) -> None:
        """Wait until the process has written a file or folder."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")
