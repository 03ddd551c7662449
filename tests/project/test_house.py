"""Rooms import in one direction, and no file is longer than one reads in a sitting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_rooms_import_in_one_direction() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_longer_than_450_lines() -> None:
    files = [
        path
        for folder in ("sae_gated_plugin", "tests", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    ]
    long = {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 450}
    assert len(files) > 100
    assert not long
