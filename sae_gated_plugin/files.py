"""Files that are written whole or not at all, read with a sentence when damaged, and locked."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from safetensors import SafetensorError

from .errors import ArtifactError, ConfigError, first_line


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises ArtifactError where it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud800" is half a character
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"'{path}' is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"'{path}' must hold a JSON object.")
    return cast("dict[str, Any]", value)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all. Raises ArtifactError where the disk refuses."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(f"'{path}' cannot be written: {error.strerror}.") from error


def expanded(path: str | Path) -> Path:
    """A path with `~` as in a shell, which leaves it where there is no such home folder."""
    return Path(os.path.expanduser(path))


def require_local(what: str, name: str, allowed: str) -> None:
    """Raise ConfigError for a path of this machine that is not there; a Hub's name has one slash.

    allowed: what may be given instead, the rest of the sentence.
    """
    path = expanded(name)
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if (is_path or ("/" in name and path.parent.is_dir())) and not path.exists():
        raise ConfigError(f"{what} '{name}' does not exist: no such file or folder. {allowed}")


logger = logging.getLogger("sae_gated_plugin")

HIDDEN = ".partial-"  # being filled, or on its way out


@contextmanager
def filling(temporary: Path, what: str) -> Generator[Path]:
    """Make an empty folder, remove it in the end, turn what the disk refuses into a sentence."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:  # whoever wrote, in its own words
        raise ArtifactError(f"{what} cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """A file's SHA-256, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows neither can nor needs to
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(file: Path, text: str) -> None:
    """Create a file, whole or not at all however this process ends; of two, one succeeds.

    Raises FileExistsError where there is one already, OSError where the disk refuses.
    """
    new = file.with_name(f"{HIDDEN}{file.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        sync(new)
        try:
            os.link(new, file)
        except OSError:
            if file.exists():
                raise FileExistsError(str(file)) from None
            new.rename(file)  # no hard links here; a rename may replace, so two could succeed
        sync(file.parent)
        for left in file.parent.glob(f"{HIDDEN}{file.name}.*"):  # by others, killed or too late
            left.unlink(missing_ok=True)
    except FileNotFoundError:  # this one came too late
        raise FileExistsError(str(file)) from None
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, what: str | None = None) -> Generator[None]:
    """Hold the lock on a run's file. Raises ConfigError where another process, or this one, has it.

    what: the subject of that sentence, default the run.

    The operating system drops the lock when its holder dies, however it dies: no process id to be
    mistaken, no clock to be trusted, nothing to clean up.
    """
    try:
        handle = file.open("r+b")
    except OSError as error:
        raise ConfigError(f"'{file}' cannot be opened to train there: {error.strerror}.") from error
    with handle:
        if not _lock(handle):
            what = what or f"Run '{file.parent}'"
            raise ConfigError(f"{what} is being trained by another process; nothing was changed.")
        yield


def _lock(handle: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            handle.seek(1 << 30)  # locked bytes cannot be read: take one beyond the end
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning("'%s' cannot be locked here (%s): start one training only.", handle, error)
    return True
