"""The package's files with the first line of their docstrings, in CONTRIBUTING.md.

python scripts/tree.py [--check]  # write the list, or fail if it is stale
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
MARKS = "<!-- made by scripts/tree.py: begin -->", "<!-- end -->"


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".")


def tree() -> str:
    """One line per room and file, rooms after the files beside them."""
    package = ROOT / "sae_gated_plugin"
    lines = ["```", "sae_gated_plugin/"]
    files = sorted(package.rglob("*.py"), key=lambda p: (p.parent.parts, p.stem))
    files = [path for path in files if "activation" not in path.parent.parts]
    for path in files:
        place = path.relative_to(package)
        depth = len(place.parts)
        if path.name == "__init__.py":
            if path.parent == package:
                continue
            name, depth = f"{path.parent.name}/", depth - 1
        else:
            name = path.name
        lines.append(f"{'  ' * depth + name:<28}{first_line(path)}".rstrip())
    return "\n".join([*lines, "```"])


def page() -> str:
    """CONTRIBUTING.md with its list made anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1], 1)[1]
    return before + "\n".join([MARKS[0], tree(), MARKS[1]]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif page() != PAGE.read_text(encoding="utf-8"):
        sys.exit("CONTRIBUTING.md is older than the package: python scripts/tree.py")


if __name__ == "__main__":
    main()
