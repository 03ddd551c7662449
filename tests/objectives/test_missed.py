"""What was asked for and not reached is said: at the end, in results.json, in tables and pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.test_cli import call
from cli.test_tables import NUMBERS, cells, printed
from publish.test_model_card import html
from support.runs import SMALL_RUN

from sae_gated_plugin.cli.tables import results_table, sweep_table
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.publish.card import Card, Entry, render
from sae_gated_plugin.report.page import write_report
from sae_gated_plugin.results import shortcomings
from sae_gated_plugin.training.run import train

MISSED = "target_l0 was 16"
NONE = "Next to no latent is active"


def test_near_a_target_nothing_is_said() -> None:
    for l0 in (14.5, 16, 17.5):
        assert shortcomings({"l0": l0, "target_l0": 16, "dead_share": 0.2}) == {}
    assert shortcomings({"l0": None, "target_l0": 16}) == {}
    assert shortcomings({"l0": 115.0, "target_l0": None}) == {}
    for l0 in (14.3, 17.7):
        assert list(shortcomings({"l0": l0, "target_l0": 16})) == ["l0"]


def test_what_to_do_is_of_what_was_trained() -> None:
    """SAELens's jumprelu has a target and no λ; ours have both."""
    missed = {"l0": 40.0, "target_l0": 16}
    ours = shortcomings({**missed, "l1_coefficient": 3.0})["l0"]
    theirs = shortcomings({**missed, "l1_coefficient": None})["l0"]
    assert "λ" in ours
    assert "l0_coefficient" not in ours
    assert "l0_coefficient" in theirs
    assert "λ" not in theirs


def test_a_missed_target_is_said_everywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ["sae.target_l0=16", "sae.l1_warm_up_steps=100", "training_tokens=10240"]
    results = train(load_config(SMALL_RUN, overrides), tmp_path / "run")
    assert results["l0"] > 30
    note = results["notes"]["l0"]
    assert note.startswith(MISSED)
    assert "λ" in note
    assert note in caplog.text
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["notes"]["l0"] == note
    config = json.loads((tmp_path / "run" / "cfg.json").read_text())
    assert note in html(render(Card("me/x", [Entry("run", config, saved)])))
    page = Path(write_report([tmp_path / "run"], tmp_path / "page")["page"]).read_text()
    assert "missed their target_l0" in page


def test_no_active_latent_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """60 steps of it are fewer than the guard of training waits for."""
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(SMALL_RUN))
    options = ("lr=10", "training_tokens=30720", "n_eval_batches=1")
    done = call("train", config, *options, "--output", tmp_path / "run")
    assert done.exit_code == 0, done.output
    results: dict[str, Any] = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["l0"], results["dead_share"]) == (0, 1)
    assert results["notes"]["l0"].startswith(NONE)
    assert NONE.replace(" ", "") in cells(done.stdout).replace(" ", "")
    assert NONE in caplog.text


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_show_the_target(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"architecture": "gated", "d_in": 8, "d_sae": 16, "hook_name": "h", "tokens": 9}
    more = {"training_tokens": 9, "split": "test", "seconds": 1, "undefined": {}, "target_l0": 16}
    reached = {**NUMBERS, **about, **more, "l0": 16.2, "label": "gated", "seed": 0}
    missed = {**reached, "l0": 115.0, "dead_share": 0.0}
    missed["notes"] = shortcomings(missed)
    assert "target 16" in cells(printed(results_table(reached)[1:2], width))
    shown = cells(printed(results_table(missed)[1:2], width)).replace(" ", "")
    assert missed["notes"]["l0"].replace(" ", "") in shown
    _, *lines = sweep_table("out", [{**reached, "dead_share": 0.0}, missed])
    assert [line for line in lines if MISSED in str(line)] == lines[:1]
    assert str(lines[0]).startswith("gated, target_l0=16, seed 0: ")
