"""The page in a browser: laid out on a screen and on a phone, and its tables sorted."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.results_files import result

from sae_gated_plugin.report.page import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
LAYOUT = """frame => {
  const page = frame.contentDocument, clashes = [];
  for (const svg of page.querySelectorAll("figure svg")) {
    const texts = [...svg.querySelectorAll('g[id*="-text_"]')].map(t => t.getBoundingClientRect())
      .filter(t => t.width > 0), all = svg.getBoundingClientRect();
    texts.forEach((a, i) => {
      if (a.left < all.left - 1 || a.right > all.right + 1 || a.bottom > all.bottom + 1)
        clashes.push("clipped");
      texts.slice(i + 1).forEach(b => {
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) clashes.push("overlap");
      });
    });
  }
  return {
    width: frame.clientWidth, content: page.documentElement.scrollWidth, clashes,
    texts: page.querySelectorAll('svg g[id*="-text_"]').length,
    table: page.querySelector("table").scrollWidth,
  };
}"""
SORT = """frame => {
  const clicks = [];
  for (const table of frame.contentDocument.querySelectorAll("table.sortable"))
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      for (const click of [1, 2]) {
        head.click();
        const cells = [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
        clicks.push([head.textContent.trim(), head.getAttribute("aria-sort"), cells]);
      }
    });
  return clicks;
}"""


def _in_browser(page: Path, function: str, widths: tuple[int, ...], folder: Path) -> list[Any]:
    """What a JavaScript function of a frame says of the page, in a frame of each width."""
    frames = "".join(
        f'<iframe src="{page.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in widths
    )
    (folder / "probe.html").write_text(
        f"""<!doctype html><body>{frames}<script>onload = () => {{
        const found = [...document.querySelectorAll("iframe")].map({function});
        const pre = document.createElement("pre");
        pre.textContent = JSON.stringify(found);
        document.body.replaceChildren(pre);
        }}</script>""",
        encoding="utf-8",
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    command = [
        *(str(CHROMIUM), *options, f"--user-data-dir={folder / 'browser'}"),
        *("--dump-dom", (folder / "probe.html").as_uri()),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return json.loads(html.unescape(re.search("<pre>(.*)</pre>", dom, re.S)[1]))


def test_a_browser_lays_it_out_on_a_screen_and_on_a_phone(crowded: Path, tmp_path: Path):
    found = _in_browser(crowded, LAYOUT, (1280, 390), tmp_path)
    assert [frame["width"] for frame in found] == [1280, 390]
    for frame in found:
        assert frame["content"] <= frame["width"]
        assert frame["texts"] > 100
        assert frame["clashes"] == []
    assert found[1]["table"] > 390  # it is the table's box that scrolls


def test_a_click_sorts_and_a_second_one_turns_it_round(save: Any, tmp_path: Path):
    """Numbers by value, words by the numbers in them, and what has no value last, both times."""
    l0 = {"gated": (8.5, 16, 120), "2 layers": (9.25, 1300), "Topk": (90,), "standard": (20, 110)}
    values = [
        result(label, 10 - i, x, settings={"k": round(x)}, histograms={})
        for label, of_label in l0.items()
        for i, x in enumerate(of_label)
    ]
    for value in values[1:4]:
        value["l1_coefficient"] = None
    page = Path(write_report([save(*values)], tmp_path / "out")["page"])
    (clicks,) = _in_browser(page, SORT, (1280,), tmp_path)

    def number(cell: str) -> float | None:
        found = re.match(r"(?:(?:less|more) than )?(-?[\d,.e+-]+)", cell)
        return float(found[1].replace(",", "")) if found else None

    def words(cell: str) -> list[Any]:
        parts = re.split(r"(\d+)", cell.lower())
        return [int(part) if part.isdigit() else part for part in parts]

    assert [way for _, way, _ in clicks] == ["ascending", "descending"] * (len(clicks) // 2)
    sorted_columns = {}
    for heading, way, cells in clicks:
        down = way == "descending"
        if heading in ("label", "setting", "compared with", "how"):
            assert cells == sorted(cells, key=words, reverse=down), heading
        else:
            numbers = [number(cell) for cell in cells]
            known = [x for x in numbers if x is not None]
            assert numbers == sorted(known, reverse=down) + [None] * (len(cells) - len(known))
        sorted_columns[heading, way] = cells
    assert sorted_columns["λ", "descending"][0] == "28.24"
    assert [cell[:4] for cell in sorted_columns["λ", "descending"][-3:]] == ["none"] * 3
    assert sorted_columns["L0", "ascending"][-1] == "1300.0"
    assert sorted_columns["label", "ascending"][0] == "2 layers"
    assert sorted_columns["setting", "ascending"][0].endswith("8")
