"""The matrix of versions: its table, its rows, what is recorded of a run."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (".github/COMPATIBILITY.md", ".github/compatibility.json", "scripts/compatibility.py")
FAILED = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"/></testsuites>'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def run(checkout: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, checkout / FILES[2], *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_the_table_is_up_to_date() -> None:
    done = run(ROOT, "table", "--check")
    assert done.returncode == 0, done.stderr


def test_the_list_of_files_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/tree.py", "--check"], capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_run_is_recorded_and_the_table_made_from_it(checkout: Path) -> None:
    matrix = json.loads(run(checkout, "matrix").stdout)["include"]
    name = matrix[0]["name"]
    (checkout / "bad.xml").write_text(FAILED)
    done = run(checkout, "record", name, checkout / "bad.xml")
    assert done.returncode == 1
    assert "1 of 3 tests did not pass; nothing was recorded" in done.stderr
    (checkout / "good.xml").write_text(FAILED.replace('failures="1"', 'failures="0"'))
    assert run(checkout, "record", name, checkout / "good.xml").returncode == 0
    assert json.loads(run(checkout, "matrix").stdout)["include"] == matrix
    stale = run(checkout, "table", "--check")
    assert stale.returncode == 1
    assert "scripts/compatibility.py table" in stale.stderr
    assert run(checkout, "table").returncode == 0
    assert run(checkout, "table", "--check").returncode == 0
    assert "2 passed, 1 skipped" in (checkout / FILES[0]).read_text(encoding="utf-8")


def test_the_rows_begin_where_the_package_does() -> None:
    rows = runpy.run_path(str(ROOT / FILES[2]))["rows"]().values()
    oldest = min((row["sae-lens"] for row in rows), key=lambda v: tuple(map(int, v.split("."))))
    assert f'"sae-lens>={oldest},<7"' in (ROOT / "pyproject.toml").read_text()
    assert {row["transformer-lens"].split(".")[0] for row in rows} == {"2", "3"}
