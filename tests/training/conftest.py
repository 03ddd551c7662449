"""The small run of `support.resuming`: whole, and stopped in the middle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.process import Process
from support.resuming import TINY, WEIGHTS, interrupted

from sae_gated_plugin.config.yaml import to_yaml


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(to_yaml(TINY))
    return path


@pytest.fixture(scope="session")
def whole(tiny_yaml: Path) -> bytes:
    """Weights of a run that nothing interrupts."""
    folder = tiny_yaml.parent / "whole"
    process = Process("train", tiny_yaml, "--output", folder, log=tiny_yaml.parent / "log")
    assert process.wait() == 0, process.text()
    return (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run interrupted at its 30th step; copy it before going on with it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupted(TINY, folder)
    return folder


@pytest.fixture
def on_copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copy"))
