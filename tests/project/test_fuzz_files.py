"""Weights, cards and results, mangled: right, or refused in a sentence.

How to run many: see mangling.py.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import example
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from publish.test_model_card import CONFIG, RESULTS, RUN
from report.test_report import Page
from saes.test_loaders import gated_tensors, saved
from safetensors.torch import load_file, save_file
from support.mangling import FIELDS, JUNK, TEXT, fuzz, mutated, sentence, spliced
from support.results_files import result

from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.publish.card import BEGIN, END, METRICS, Card, Entry, render
from sae_gated_plugin.report import page
from sae_gated_plugin.report.page import write_report
from sae_gated_plugin.saes import loaders
from sae_gated_plugin.saes.load import load_sae, training_tokens
from sae_gated_plugin.training import checkpoints

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # of SAELens's configurations, and of failing plugins
]


ODD_TENSORS = [
    torch.zeros(3),
    torch.zeros(16, dtype=torch.int64),
    torch.full((8, 16), math.nan),
    torch.full((16,), math.inf),
    torch.zeros(16, dtype=torch.float64),
    torch.zeros(0),
    torch.zeros((16, 8), dtype=torch.bool),
]
CFG = {
    "architecture": "gated", "d_in": 8, "d_sae": 16, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {"hook_name": "h", "seqpos_slice": [1, None], "prepend_bos": False},
}  # fmt: skip


@fuzz(
    "run folder",
    mutated([CFG], FIELDS) | st.just(CFG),
    st.none() | st.integers(0, 10**9),
    st.none() | st.tuples(st.sampled_from(["W_enc", "b_mag", "x", "W_dec"]), st.integers(0, 6)),
    st.randoms(use_true_random=False),
)
@example({**CFG, "apply_b_dec_to_input": "false"}, None, None, None)
@example({**CFG, "metadata": {"training_architecture_details": "x"}}, None, None, None)
@example(CFG, None, ("W_enc", 2), None)
def test_run_folders(
    run_folder: Path, cfg: dict[str, Any], cut: int | None, odd: tuple[str, int] | None, random: Any
) -> None:
    """cut: a place in the file of weights where something is changed. odd: a tensor replaced."""
    weights = load_file(run_folder / "sae_weights.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sae_weights.safetensors"
        save_file({**weights, **({odd[0]: ODD_TENSORS[odd[1]]} if odd else {})}, path)
        if cut is not None:
            content = bytearray(path.read_bytes())
            cut %= len(content) if random.random() < 0.5 else 600  # often in the header
            content[cut : cut + random.choice([0, 1, 8])] = random.randbytes(
                random.choice([0, 1, 8])
            )
            path.write_bytes(content[: None if random.random() < 0.8 else cut])
        (Path(folder) / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
        sae = sentence(lambda: load_sae(folder))
    if sae is None:
        return
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    for name, value in cfg.items():
        if name not in ("architecture", "metadata", "device") and hasattr(sae.cfg, name):
            assert getattr(sae.cfg, name) == value
            assert isinstance(value, bool) == isinstance(getattr(sae.cfg, name), bool)
    if cut is None and odd is None and sae.cfg.architecture() == "gated":
        for name, tensor in weights.items():
            torch.testing.assert_close(sae.state_dict()[name].float(), tensor, rtol=0.01, atol=0.01)


@fuzz("checkpoint", st.data())
def test_checkpoints(place: Path, data: st.DataObject) -> None:
    """Only what is as written is taken, whatever the manifest says, and nothing else is raised."""
    folder = Path(tempfile.mkdtemp(dir=place))
    state = {"n_training_samples": 7, "tensor": torch.zeros(3)}
    with checkpoints.writing(folder / "7", {"step": 3}) as new:
        torch.save(state, new / "trainer_state.pt")
        (new / "weights").write_bytes(b"abc")
    files = {path: path.read_bytes() for path in (folder / "7").iterdir()}
    changed = data.draw(st.sampled_from(sorted(files)))
    if data.draw(st.booleans()):
        body = json.loads(files[folder / "7" / "manifest.json"])
        body.pop("sha256")
        body = data.draw(mutated([body], ["files", "weights", "../x"]))
        body["sha256"] = checkpoints._digest(body)
        changed = folder / "7" / "manifest.json"
        changed.write_text(json.dumps(body))
    else:
        changed.write_bytes(data.draw(spliced([files[changed]], [b"{", b"}", b"null", b"PK"])))
    taken = sentence(lambda: checkpoints.newest(folder))
    if taken and changed.name != "manifest.json":
        assert changed.read_bytes() == files[changed]
    elif taken:
        assert set(taken[1]["files"]) <= {"trainer_state.pt", "weights"}
    tokens = training_tokens(folder / "7")
    assert tokens is None or type(tokens) is int
    shutil.rmtree(folder)


TENSOR_FILES = [saved(gated_tensors()), saved({"state_dict": gated_tensors(), "x": 1}), saved([1])]


@fuzz("tensors", spliced([*TENSOR_FILES], [b"PK", b"\x80\x02cos\nsystem\n"]), st.booleans())
def test_files_of_tensors(place: Path, content: bytes, safetensors: bool) -> None:
    path = place / ("any.safetensors" if safetensors else "any.pt")
    path.write_bytes(content)
    tensors = sentence(lambda: loaders.load_tensors(path))
    assert tensors is None or all(isinstance(value, torch.Tensor) for value in tensors.values())


# --- cards ----------------------------------------------------------------------------------------

FILES = {"config": CONFIG, "results": RESULTS, "run": RUN}
NUMBERED = [measure.key for measure in METRICS]
TAGS = ("<h1", "<h2", "<td", "<em", "<img", "<a ", "<strong", "<b>", "<script", "<details")


def parts(text: str) -> tuple[Any, str]:
    """A card's front matter, read, and what is below it."""
    found = REGEX_YAML_BLOCK.search(text)
    assert found
    return yaml.safe_load(found[2]), text[found.end() :]


def shown(text: str) -> dict[str, int]:
    """How often a card's page has the tags that a name could smuggle in."""
    page = MarkdownIt("commonmark").enable("table").render(parts(text)[1]).lower()
    return {tag: page.count(tag) for tag in TAGS}


NAMES = TEXT.filter(lambda name: name and name.isprintable())


@fuzz("card", mutated([FILES], [*NUMBERED, "tokens", "undefined"]), NAMES)
@example({**FILES, "results": {**RESULTS, "gamma": "1"}}, "a")
@example({**FILES, "results": {**RESULTS, "l0": math.nan}}, "a")
@example({**FILES, "config": {**CONFIG, "d_in": "1 | <script>"}}, "a")
@example({**FILES, "config": {**CONFIG, "d_in": 0}}, "a")
@example({**FILES, "run": {"x": END}}, "a")
@example({**FILES, "config": {**CONFIG, "metadata": {"hook_name": " "}}}, "``")
def test_cards(files: dict[str, Any], name: str) -> None:
    values = {"config": {}, **{key: files[key] for key in FILES if key in files}}
    card = Card("me/x", [Entry(name, **values)])
    if not isinstance(values["config"], dict):
        return
    text = sentence(lambda: render(card))
    if text is None:
        return
    text.encode()
    assert shown(text) == shown(render(Card("me/x", [Entry("a", CONFIG, RESULTS, RUN)])))
    front, body = parts(text)
    assert body.count(BEGIN) == body.count(END) == 1
    assert render(card, text) == text
    assert Entry(name, **values).trained_as in front["tags"]
    results = values.get("results") or {}
    given_ = {key: results[key] for key in NUMBERED if results.get(key) is not None}
    measured = front["model-index"][0]["results"] if "model-index" in front else []
    assert {m["type"]: m["value"] for r in measured for m in r["metrics"]} == given_
    for measure in METRICS:
        if measure.key in given_:
            cell = measure.text(given_[measure.key])
            assert f" {cell} " in text or f" {cell} [" in text


FRONTS = st.dictionaries(TEXT, JUNK, max_size=3)
ASIDE = (
    st.lists(TEXT, max_size=4)
    .map("".join)
    .filter(lambda text: BEGIN not in text and END not in text)
)


@fuzz("hand-written card", FRONTS, ASIDE, ASIDE, st.booleans())
@example({}, "    code\n", "x", True)
@example({}, "", f"\n{END}\n{BEGIN}\n", True)
@example({"model-index": [{"name": 3}], "x": None, "ignore_metadata_errors": True}, "", "", True)
def test_what_was_written_by_hand_survives(
    front: dict[str, Any], before: str, after: str, is_ours: bool
) -> None:
    card = Card("me/x", [Entry("a", CONFIG, RESULTS, RUN)])
    before, after = (text.replace("\ud800", "?") for text in (before, after))
    fresh = render(card)
    ours = fresh[fresh.index(BEGIN) : fresh.index(END) + len(END)]
    header = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" if is_ours else ""
    existing = f"{header}{before}{ours if is_ours else ''}{after}"
    text = sentence(lambda: render(card, existing))
    if text is None:
        assert not is_ours  # a text that begins like front matter and is none
        return
    if not is_ours:
        found = REGEX_YAML_BLOCK.search(existing)
        body = existing[found.end() :] if found and "\n---" not in text[4:] else existing
        assert body.strip("\r\n") in text or found
        return
    kept = {key: value for key, value in front.items() if key not in parts(fresh)[0]}
    assert repr({k: v for k, v in parts(text)[0].items() if k in kept}) == repr(kept)
    assert f"{before}{ours}{after}".strip("\r\n") in text


# --- results --------------------------------------------------------------------------------------

POINTS = [
    [result()],
    [result(), result("standard", l0=40.0)],
    [result(l0=9.0), result(), result("b")],
]
CELLS = {"l0": (3, "{:.1f}"), "nats_lost": (5, "{:.4f}"), "kl": (6, "{:.4f}"), "fvu": (7, "{:.4f}")}


def table(folder: Path) -> list[tuple[str, ...]]:
    """Label and some cells of every row of a report's page, on which nothing points outside."""
    page = Page(folder / "report.html")
    assert all(address.startswith("#") for address in page.addresses)
    found = re.findall("<(script|img|iframe|b)[ >]", page.html)
    assert found == ["script"]  # the page's own, which sorts its tables
    return [
        (" ".join(row[0].split()), *(row[i] for i, _ in CELLS.values())) for row in page.rows[1:]
    ]


def require_given(points: list[dict[str, Any]], rows: list[tuple[str, ...]]) -> None:
    """Every number that was given is in the table, and nothing else is."""
    assert len(rows) == len(points)
    for point in points:
        label = " ".join(((point.get("label") or "").strip() or point["architecture"]).split())
        cells = [
            "none" if point[k] is None else form.format(point[k]) for k, (_, form) in CELLS.items()
        ]
        fits = [r for r in rows if r[0] == label and all(map(str.startswith, r[1:], cells))]
        assert fits, (label, cells, rows)


@fuzz("results", mutated(POINTS, ["label", "seed", "undefined"]), st.none() | st.integers(0, 3000))
@example([result(l0=1e299), result(l0=1e-299), result("b", l0=1e-200), result("b", l0=1e200)], None)
@example([result(d_in=10**4000)], None)
@example([result(undefined={"a": "\ud800"})], None)
@example([result(histograms={"../../x": {"edges": [0, 1], "counts": [10**400]}})], None)
def test_results(place: Path, points: Any, cut: int | None) -> None:
    """cut: where a literal that is no JSON is put in."""
    folder = Path(tempfile.mkdtemp(dir=place))
    for number, point in enumerate(points):
        (folder / str(number)).mkdir()
        text = json.dumps(point)
        if cut is not None:
            text = text[:cut] + ["NaN", "1e999", ",", "[" * 9000][cut % 4] + text[cut:]
        (folder / str(number) / "results.json").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw", lambda *_: [])  # a second each: see the next test
        written = sentence(lambda: write_report([folder], folder / "report"), ConfigError)
    if written and cut is None:
        require_given(points, table(folder / "report"))
    shutil.rmtree(folder)


@fuzz("report", mutated(POINTS, ["label", "seed", "undefined"]))
@example([result(histograms={"../../x": {"edges": [0, 1], "counts": [3]}})])
def test_reports(place: Path, points: Any) -> None:
    folder = Path(tempfile.mkdtemp(dir=place))
    for number, point in enumerate(points):
        (folder / str(number)).mkdir()
        (folder / str(number) / "results.json").write_text(json.dumps(point), encoding="utf-8")
    written = sentence(lambda: write_report([folder], folder / "report"), ConfigError)
    if written:
        require_given(points, table(folder / "report"))
        for figure in written["figures"]:
            assert Path(figure).resolve().parent == (folder / "report" / "figures").resolve()
    shutil.rmtree(folder)
