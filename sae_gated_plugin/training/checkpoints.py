"""Checkpoints that are whole or not there.

A checkpoint is the folder `checkpoints/TOKENS`: SAELens's files, `exact_state.safetensors` with the
state that SAELens leaves out, and `manifest.json` with every file's SHA-256. It is filled under a
hidden name, synced to the disk and renamed, so a reader never sees half of one; what a crash leaves
behind has a hidden name and goes with the next checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME, TRAINER_STATE_FILENAME

from ..errors import ArtifactError, disk_full, first_line
from ..files import HIDDEN, filling, logger, read_json, sha256, sync

MANIFEST_FILE = "manifest.json"
EXACT_STATE_FILE = "exact_state.safetensors"

#: How many checkpoints of a run are kept: the newest, and one to fall back on.
KEPT = 2


@contextmanager
def writing(path: Path, about: dict[str, Any]) -> Generator[Path]:
    """Yield a folder to fill; when the block ends it becomes `path`, whole and synced to the disk.

    about: what the manifest says beside the files' hashes. Raises ArtifactError where the disk is
    full or refuses; `path` and every other checkpoint are then as they were.
    """
    with filling(path.parent / f"{HIDDEN}{path.name}", f"Checkpoint '{path}'") as new:
        yield new
        obey_umask(new)
        files = {file.name: sha256(file) for file in sorted(new.iterdir())}
        body = {**about, "files": files}
        manifest = json.dumps({**body, "sha256": _digest(body)}, indent=2)
        (new / MANIFEST_FILE).write_text(manifest + "\n", encoding="utf-8")
        for written in (*new.iterdir(), new):
            sync(written)
        if path.exists():
            path.rename(path.with_name(f"{HIDDEN}replaced-{path.name}"))
        new.rename(path)
        sync(path.parent)
        sync(path.parent.parent)  # the first checkpoint makes the folder, too


#: Bytes that configurations and results take beside weights, with room to spare.
BESIDE_WEIGHTS = 128 * 1024


@contextmanager
def reserving(file: Path, saes: Iterable[torch.nn.Module]) -> Generator[None]:
    """Take the room that the files of SAEs will need, as `file`: to be removed just before they are
    written, and in the end.

    What fills the disk meanwhile then costs no finished training, which need not have a checkpoint.
    Raises ArtifactError where there is no room. A system that sets none aside does without.
    """
    states = [sae.state_dict() for sae in saes]
    weights = sum(tensor.nbytes for state in states for tensor in state.values())
    size = weights + len(states) * BESIDE_WEIGHTS
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                with file.open("wb") as room:
                    os.posix_fallocate(room.fileno(), 0, size)
            except OSError as error:
                if disk_full(error):
                    what = "the SAE" if len(states) == 1 else f"{len(states)} SAEs"
                    sentence = f"'{file.parent}' has no room for {what}, {size / 1e6:.1f} MB."
                    raise ArtifactError(sentence) from error
        yield
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def writing_final(folder: Path) -> Generator[Path]:
    """Yield a folder to fill; when the block ends, its files are moved into `folder`, synced.

    `runner_cfg.json` comes last: a folder that has it has all of them. Raises as `writing` does.
    """
    with filling(folder / f"{HIDDEN}final", f"The SAE in '{folder}'") as new:
        yield new
        obey_umask(new)
        for file in sorted(new.iterdir(), key=lambda file: file.name == RUNNER_CFG_FILENAME):
            sync(file)
            os.replace(file, folder / file.name)
        sync(folder)


def obey_umask(folder: Path) -> None:
    """Give a folder's files the mode of any new file; safetensors lets their owner alone read."""
    new = folder / f"{HIDDEN}mode"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def prune(folder: Path, keep: int = KEPT) -> None:
    """Remove all but the newest `keep` checkpoints, each at once, and what crashes left behind."""
    for path in numbered(folder)[:-keep] if keep else ():
        path.rename(path.with_name(f"{HIDDEN}{path.name}"))
    for path in folder.glob(f"{HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first: those named by a number of tokens."""
    found = [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is what its manifest says, and the manifest; None without one.

    A damaged one is renamed, with a warning that says what is wrong with it.
    """
    for path in reversed(numbered(folder)):
        try:
            return path, verify(path)
        except ArtifactError as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("%s It is set aside as '%s'.", error, aside)
    return None


def verify(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises ArtifactError naming the file that is not as written.

    `trainer_state.pt` must hold tensors and plain values alone, nothing that would run code.
    """
    damaged = f"Checkpoint '{path}' is damaged:"
    try:
        manifest = read_json(path / MANIFEST_FILE)
    except ArtifactError:
        manifest: dict[str, Any] = {}
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ArtifactError(f"{damaged} {MANIFEST_FILE} is missing or not as written.")
    if not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{damaged} {MANIFEST_FILE} lists no files.")
    present = {file.name for file in path.iterdir() if file.is_file()}
    for name, digest in manifest["files"].items():
        if name not in present:
            raise ArtifactError(f"{damaged} {name} is missing.")
        if sha256(path / name) != digest:
            raise ArtifactError(f"{damaged} {name} is not as written.")
    require_tensors_only(path)
    return manifest


def require_tensors_only(path: Path) -> None:
    """Raise ArtifactError where unpickling a checkpoint's trainer state would run code."""
    try:
        torch.load(path / TRAINER_STATE_FILENAME, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch has no one class for it
        raise ArtifactError(
            f"'{path / TRAINER_STATE_FILENAME}' cannot be read as tensors: {first_line(error)}"
        ) from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
