"""Sessions in fresh environments: `nox -l` lists them. Each needs nothing but nox and a Python.

The rows of `compatibility` are those of .github/compatibility.json; a run that passes writes its
counts there and into the table beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
import compatibility as matrix

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"

ROWS = matrix.rows()
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, and whether the compatibility table is up to date."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")
    session.run("lint-imports")
    session.run("python", "scripts/compatibility.py", "table", "--check")
    session.run("python", "scripts/tree.py", "--check")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests with the newest of everything; arguments after -- go to pytest."""
    session.install("-e", ".[dev]")
    session.run("pytest", "-n", "auto", *session.posargs, env=OFFLINE)


@nox.session
def coverage(session: nox.Session) -> None:
    """The tests, and which lines and branches they reach, in the processes they start too."""
    session.install("-e", ".[dev]")
    measured = ("--cov", "--cov-report=term:skip-covered")  # of what pyproject.toml says
    session.run("pytest", "-n", "auto", *measured, *session.posargs, env=OFFLINE)


@nox.session
def probes(session: nox.Session) -> None:
    """Sparse probing with sae-probes, which wants pandas before 3 and pyarrow before 26."""
    session.install("-e", ".[dev,probes]")
    session.run("pytest", "tests/measure/test_probe.py", *session.posargs, env=OFFLINE)


@nox.session
@nox.parametrize(
    "python,row", [(row["python"], name) for name, row in ROWS.items()], ids=list(ROWS)
)
def compatibility(session: nox.Session, row: str) -> None:
    """The tests with the versions of one row; arguments after -- go to pytest."""
    session.install(*matrix.requirements(ROWS[row]), "-e", ".[dev]")
    # TransformerLens 3 deprecates modules of its own that SAELens imports. No other warning may
    # be there, of whomever; in the tests pyproject.toml makes ours errors, deprecations too.
    strict = ("-W", "error", "-W", "ignore::DeprecationWarning")
    session.run("python", *strict, "-c", "import sae_lens; sae_lens.SAE", env=OFFLINE)
    report = Path(session.virtualenv.location, "pytest.xml")
    session.run("pytest", "-n", "auto", f"--junitxml={report}", *session.posargs, env=OFFLINE)
    if not session.posargs:
        session.run("python", "scripts/compatibility.py", "record", row, str(report))
        session.run("python", "scripts/compatibility.py", "table")
