"""The versions we test with: rows for CI, counts of a run, and the table of them.

    python scripts/compatibility.py matrix           # rows as GitHub's matrix
    python scripts/compatibility.py record ROW XML   # a row's counts from pytest's JUnit file
    python scripts/compatibility.py table [--check]  # write the table, or fail if stale

Rows are in .github/compatibility.json; `beside` pins what newer releases of others have broken.
Without counts a row has been run by nobody yet, and the table says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
ROWS = ROOT / ".github" / "compatibility.json"
PAGE = ROOT / ".github" / "COMPATIBILITY.md"
MARKS = "<!-- made by scripts/compatibility.py: begin -->", "<!-- end -->"
_PINNED = ("sae-lens", "transformer-lens", "torch")


def rows() -> dict[str, dict[str, Any]]:
    """Name of a row → its versions and, where it has been run, its counts."""
    found: list[dict[str, Any]] = json.loads(ROWS.read_text(encoding="utf-8"))
    names = [("py", "python"), ("sae-lens", "sae-lens"), ("transformer-lens", "transformer-lens")]
    return {"-".join(short + row[key] for short, key in names): row for row in found}


def requirements(row: dict[str, Any]) -> list[str]:
    """What pip is asked for, beside this project."""
    return [f"{name}=={row[name]}" for name in _PINNED] + row["beside"]


def record(name: str, report: Path) -> None:
    """Put the counts of pytest's JUnit file into a row; a run with a failure is an error."""
    everything = rows()
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {key: 0 for key in ("tests", "failures", "errors", "skipped")}
    for suite in suites:
        for key in counts:
            counts[key] += int(suite.attrib[key])
    bad = counts["failures"] + counts["errors"]
    if bad or counts["tests"] == counts["skipped"]:
        sys.exit(f"{name}: {bad} of {counts['tests']} tests did not pass; nothing was recorded.")
    everything[name]["passed"] = counts["tests"] - counts["skipped"]
    everything[name]["skipped"] = counts["skipped"]
    everything[name]["date"] = datetime.date.today().isoformat()
    lines = ",\n  ".join(json.dumps(row) for row in everything.values())
    ROWS.write_text(f"[\n  {lines}\n]\n", encoding="utf-8")


def table() -> str:
    """The page with its table made anew."""
    lines = ["| Python | sae-lens | transformer-lens | torch | beside | tests |", "|---" * 6 + "|"]
    for row in rows().values():
        tests = "not run yet"
        if "passed" in row:
            tests = f"{row['passed']} passed, {row['skipped']} skipped ({row['date']})"
        cells = [row["python"], *(row[name] for name in _PINNED)]
        cells += [", ".join(f"`{pin}`" for pin in row["beside"]), tests]
        lines.append("| " + " | ".join(cells) + " |")
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1], 1)[1]
    return before + "\n".join([MARKS[0], *lines, MARKS[1]]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("matrix")
    recording = commands.add_parser("record")
    recording.add_argument("row", choices=rows())
    recording.add_argument("report", type=Path)
    commands.add_parser("table").add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "matrix":
        named = [{"name": name, "python": row["python"]} for name, row in rows().items()]
        print(json.dumps({"include": named}))
    elif arguments.command == "record":
        record(arguments.row, arguments.report)
    elif not arguments.check:
        PAGE.write_text(table(), encoding="utf-8")
    elif table() != PAGE.read_text(encoding="utf-8"):
        sys.exit("COMPATIBILITY.md is older than the matrix: python scripts/compatibility.py table")


if __name__ == "__main__":
    main()
