"""The report: refusals, and what the page says."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.results_files import AWKWARD, grid, result

from sae_gated_plugin import report
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.report.figures import _METRICS
from sae_gated_plugin.report.page import figures_of, write_report
from sae_gated_plugin.report.reading import read_results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fvu": "much"}, "'fvu' must be a number or null, not \"much\""),
        ({"l0": -1}, "'l0' must not be negative"),
        ({"d_in": 5.5}, "'d_in' must be a whole number, not 5.5"),
        ({"seed": True}, "'seed' must be a whole number or null, not true"),
        ({"gamma_ci": [1]}, r"'gamma_ci' must be two numbers or null, not \[1\]"),
        ({"hook_name": None}, "'hook_name' must be text, not null"),
        ({"settings": []}, "'settings' must be an object or null"),
        ({"histograms": {"b": {"edges": [0, 1], "counts": [1, 2]}}}, "'histograms.b' must have"),
        ({"histograms": {"b": {"edges": [1, 0], "counts": [1]}}}, "growing numbers"),
        ({"histograms": {"b": 3}}, "'histograms.b' must have"),
    ],
)
def test_a_bad_value_is_named(save: Any, change: dict, message: str):
    with pytest.raises(ConfigError, match=rf"results\.json' is not a result: .*{message}"):
        read_results([save(result(**change))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "it holds list, where a JSON object belongs"),
        ('{"l0": NaN}', "NaN is not a number in JSON"),
        (json.dumps(result()).replace('"fvu": 0.07', '"fvu": -Infinity, "x": 0'), "-Infinity is"),
        (json.dumps(result(kl=123456)).replace("123456", "1e999"), "'kl' must be a number"),
        ("[" * 100_000, "cannot be read as JSON"),
        (json.dumps(result()).replace('"kl"', '"kk"'), "the key 'kl' is missing; it holds a num"),
    ],
)
def test_a_damaged_file_is_named(save: Any, text: str, message: str):
    with pytest.raises(ConfigError, match=rf"results\.json' is not a result: .*{message}"):
        read_results([save(text)])


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("model_name", "another/model"),
        ("hook_name", "model.layers.7"),
        ("d_in", 768),
        ("dataset", "another/text"),
        ("split", "train"),
    ],
)
def test_what_does_not_belong_together_is_refused(save: Any, key: str, other: Any):
    folder = save(result(), result(**{key: other}))
    expected = rf"runs/0/results.json' has {result()[key]!r}, .*runs/1/results.json' has {other!r}"
    with pytest.raises(ConfigError, match=f"Results of different .*{expected}"):
        read_results([folder])


def test_paths_without_results_are_refused(save: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere' does not exist; give"):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="No results in no path"):
        read_results([])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "gated-seed0.json").write_text(json.dumps(result()))
    with pytest.raises(ConfigError, match=r"files of other names are not .*kept/\*\.json\.$"):
        read_results([tmp_path / "kept"])
    assert len(read_results([tmp_path / "kept" / "gated-seed0.json"])[0]) == 1
    folder = save({"label": "a", "error": "Out of luck."}, name="failed.json")
    with pytest.raises(ConfigError, match=r"No results in .*Every point failed, the first: Out"):
        read_results([folder])
    with pytest.raises(ConfigError, match=r"failed\.json' is not a result: 'error' must be text"):
        read_results([save({"label": "a"}, name="failed.json")])


def test_other_peoples_files_are_left_alone(save: Any, tmp_path: Path):
    folder = save(result())
    output = tmp_path / "out"
    output.write_text("mine")
    with pytest.raises(ConfigError, match="out' is a file; give a folder"):
        write_report([folder], output)
    output.unlink()
    output.mkdir()
    for name in ("report.html", "report.json"):
        (output / name).write_text("{}")
        with pytest.raises(ConfigError, match=f"{name}' exists and is not a report of ours"):
            write_report([folder], output)
        assert (output / name).read_text() == "{}"
        (output / name).unlink()
    (output / "figures").write_text("mine")
    with pytest.raises(ConfigError, match="The report cannot be written to"):
        write_report([folder], output)


# --- the page -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Table cells, all text outside figures, and the attributes that can point elsewhere."""

    def __init__(self, path: str | Path):
        super().__init__()
        self.html = Path(path).read_text(encoding="utf-8")
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self._inside: list[str] = []
        self.feed(self.html)

    @property
    def rows(self) -> list[list[str]]:
        """Those of the SAEs, the last table."""
        return self.tables[-1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self._inside.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.addresses.append(str(value))
            if name == "id":
                self.ids.append(str(value))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str):
        self.text += data
        if {"td", "th"} & set(self._inside) and "sup" not in self._inside:
            self.rows[-1][-1] += data


def test_every_number_of_the_table_is_the_files(save: Any, tmp_path: Path):
    values = [
        *grid(["gated", "standard"], 3, 2, histograms={}),
        result(
            "topk",
            None,
            44.4,
            histograms={},
            loss_recovered=None,
            gamma_ci=None,
            l1_coefficient=None,
        ),
    ]
    values[-1]["undefined"] = {"loss_recovered": "Zeros are <fine>.", "gamma_ci": "One sequence."}
    page = Page(write_report([save(*values)], tmp_path / "out")["page"])

    def percent(value: float | None) -> str:
        return "none" if value is None else f"{100 * value:.2f}\u00a0%"

    def row(v: dict) -> list[str]:
        ci = "[{:.4f}–{:.4f}]".format(*v["gamma_ci"]) if v["gamma_ci"] else "[none]"
        coefficient = "none" if v["l1_coefficient"] is None else f"{v['l1_coefficient']:.4g}"
        return [
            v["label"],
            ", ".join(f"{key} =\u00a0{value}" for key, value in v["settings"].items()),
            "–" if v["seed"] is None else str(v["seed"]),
            f"{v['l0']:.1f}",
            percent(v["loss_recovered"]),
            *(f"{v[key]:.4f}" for key in ("nats_lost", "kl", "fvu")),
            f"{v['gamma']:.4f} {ci}",
            f"{v['gamma_centered']:.4f}",
            percent(v["dead_share"]),
            coefficient,
        ]

    assert sorted(page.rows[1:]) == sorted(map(row, values))
    for reason in ("Zeros are <fine>.", "One sequence.", "Not recorded in the results file."):
        assert reason in page.text
    assert "Not drawn, for want of a value: 1 of 13 SAEs." in page.text


def test_the_summary_says_what_the_page_says(save: Any, tmp_path: Path):
    ours = [
        result("gated", s, 10 * i, loss_recovered=0.9 + i / 100) for s in (0, 1) for i in (1, 2)
    ]
    theirs = [{**r, "label": "standard", "l0": 2 * r["l0"]} for r in ours]
    save({"label": "prolu", "error": "It <diverged>.", "seed": 1, "step": 7}, name="failed.json")
    output = tmp_path / "out"
    found = write_report([str(save(*ours, *theirs, result("alone")))], str(output))
    page = Page(found["page"])
    lead = "At equal loss recovered, gated needs 50.0 % [50.0–50.0 %] of standard’s active latents."
    assert found["sentences"][0].startswith(lead)
    assert found["sentences"][1].startswith("No ratio can be given for gated against alone.")
    text = " ".join(page.text.replace("\u00a0", " ").split())
    assert f"{found['sentences'][0]} The SAEs were trained on" in text
    assert [row[0] for row in page.tables[0][1:]] == ["standard", "alone"]
    for row, sentence in zip(page.tables[0][1:], found["sentences"], strict=True):
        assert sentence.endswith(row[2].replace("\u00a0", " "))
    first, second = found["comparisons"]
    assert first["ratio"] == pytest.approx(0.5, abs=1e-9)
    assert first["loss_recovered_range"] == pytest.approx([0.91, 0.92])
    assert list(first) == [
        *("label", "reference", "ratio", "low", "high", "interval", "loss_recovered_range")
    ]
    assert (second["reference"], second["ratio"], second["interval"]) == ("alone", None, None)
    assert (found["points"], found["failed"]) == (9, 1)
    assert "1 point failed" in page.text
    assert "seed 1, at step 7: It <diverged>." in page.text
    assert all(Path(figure).read_bytes().startswith(b"\x89PNG") for figure in found["figures"])
    relative = json.loads((output / "report.json").read_text())
    assert relative["page"] == "report.html"
    assert [str(output / name) for name in relative["figures"]] == found["figures"]
    assert {**relative, "page": 0, "figures": 0} == {**found, "page": 0, "figures": 0}


def test_differences_between_the_saes_are_said_first(save: Any, tmp_path: Path):
    other = result(
        "b", histograms={}, d_sae=9216, tokens=1000, model_name=None, versions={"torch": "2.14.0"}
    )
    page = Page(write_report([save(result(histograms={}), other)], tmp_path / "out")["page"])
    start = page.text[: page.text.index("Figures")]
    assert "differ in the number of latents (d_sae): 4,608 (for 1), 9,216 (for 1)." in start
    assert "differ in the number of tokens they were measured on: 1,000 (for 1), 48,768" in start
    assert "The model is not recorded for 1 of 2 SAEs." in start
    assert "torch 2.13.0 or 2.14.0" in page.text
    assert "Versions differ between the results." in page.text
    same = Page(write_report([tmp_path / "runs" / "0"], tmp_path / "same")["page"])
    assert "Versions differ" not in same.text


def test_an_old_results_file_is_read(tmp_path: Path, save: Any):
    old = result()
    for key in ("label", "seed", "model_name", "dataset", "l1_coefficient", "target_l0"):
        del old[key]
    for key in ("settings", "histograms"):
        del old[key]
    found = write_report([save(old)], tmp_path / "out")
    assert found["figures"] == []
    page = Page(found["page"])
    assert page.rows[1][:3] == ["gated", "–", "–"]
    assert "1 sparse autoencoder (SAE)" in page.text
    assert "compared" not in page.text


def test_a_single_sae_has_histograms_alone_and_the_seed_of_its_run(save: Any, tmp_path: Path):
    bare = {key: value for key, value in result().items() if key not in ("label", "seed")}
    folder = save(bare) / "0"
    assert "The seed is not recorded" in Page(write_report([folder], tmp_path / "a")["page"]).text
    (folder / "runner_cfg.json").write_text('{"seed": 42, "sae": {}}')
    found = write_report([folder], tmp_path / "b")
    names = [Path(figure).stem for figure in found["figures"]]
    assert names == ["histogram_log10_latent_density", "histogram_mystery"]
    page = Page(found["page"])
    assert page.rows[1][2] == "42"
    assert "not recorded" not in page.text
    assert 'id="table"' in page.html
    assert "<h2>Figures</h2>" not in page.html
    for broken in ("{", '{"seed": "x"}', "[]"):
        (folder / "runner_cfg.json").write_text(broken)
        assert read_results([folder])[0][0]["seed"] is None
    assert "Ratios of active latents" not in page.text
    two = write_report([save(result(seed=1))], tmp_path / "c")
    assert "Nothing is compared: all SAEs carry one label, gated." in Page(two["page"]).text
    of_text = [name for name in _METRICS if name not in ("f1", "mcc")]
    assert [Path(figure).stem for figure in two["figures"]][: len(of_text)] == of_text


def test_nothing_but_l0_zero(tmp_path: Path, save: Any):
    undefined = dict.fromkeys(("gamma", "gamma_ci", "loss_recovered"))
    nothing = {**result(), "l0": 0.0, "histograms": {}, **undefined}
    found = write_report([save(nothing, nothing)], tmp_path / "out")
    assert found["figures"] == []
    assert Page(found["page"]).rows[1][3:5] == ["0.0", "none"]


def test_the_same_input_gives_the_same_bytes(save: Any, tmp_path: Path):
    folder = save(*grid(["gated", "standard"], 2, 2))
    files = sorted(folder.rglob("results.json"))
    first, second = tmp_path / "a", tmp_path / "b"
    write_report([folder], first)
    found = write_report([*reversed(files), folder, files[0]], second)  # counts each file once
    assert found["points"] == 8
    for path in first.rglob("*.*"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path


def test_figures_of_results_in_memory_are_those_of_the_report(save: Any, tmp_path: Path):
    values = grid(["gated", "standard"], 2, 2)
    written = write_report([save(*values)], tmp_path / "out")
    drawings = figures_of(values)
    assert [f"{drawing.name}.png" for drawing in drawings] == [
        Path(figure).name for figure in written["figures"]
    ]
    assert [drawing.png for drawing in drawings] == [
        Path(figure).read_bytes() for figure in written["figures"]
    ]
    assert figures_of([]) == []
    with pytest.raises(ConfigError, match="'result 2' is not a result: the key 'kl' is missing"):
        figures_of([values[0], {key: v for key, v in values[1].items() if key != "kl"}])
    with pytest.raises(ConfigError, match=r"different hook points .* 'result 1' has .* 'result 2'"):
        figures_of([values[0], {**values[1], "hook_name": "elsewhere"}])


def test_a_report_replaces_a_report_with_its_figures(save: Any, tmp_path: Path):
    output = tmp_path / "out"
    assert len(write_report([save(result(), result(seed=1))], output)["figures"]) == 6
    (output / "figures" / "mine.png").write_text("kept")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**result(name), "histograms": {}}))
    again = write_report([tmp_path / "a.json", tmp_path / "b.json"], output)
    left = {path.name for path in (output / "figures").iterdir()}
    assert left == {"mine.png", *(Path(figure).name for figure in again["figures"])}
    assert len(left) == 5


def test_a_crowded_page_is_whole_and_needs_nothing_else(crowded: Path):
    page = Page(crowded)
    assert len(page.rows) == 106
    for label in AWKWARD:
        assert sum(row[0] == label.strip() for row in page.rows) == 7
    assert "<b>&" not in page.html
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert "http:" not in page.html
    assert "https:" not in page.html
    assert not re.search(r"@import|<link|url\((?!#)", page.html)
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, re.S)  # it sorts the tables
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.html
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert page.html.count('role="img" aria-label="') == page.html.count("<figure>") == 6


def test_the_modules_import_no_model():
    for module in Path(report.__file__).parent.glob("*.py"):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {
            n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) if not n.level
        }
        assert not [name for name in names if re.match("torch|sae_lens|transformer", name)]
        assert "matplotlib.pyplot" not in names
