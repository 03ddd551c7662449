"""The tables in a terminal of 80 and of 120 columns: names fold, no number is cut."""

from __future__ import annotations

import io
from typing import Any

import pytest
from cli.test_cli import call
from rich.console import Console

from sae_gated_plugin.cli.tables import gap_table, saes_table, sweep_table, toy_table
from sae_gated_plugin.plugins.bridge import registry
from sae_gated_plugin.results import MEASURES

WIDTHS = pytest.mark.parametrize("width", [80, 120])
NUMBERS = {"l0": 4321.5, "fvu": 0.12345, "gamma": 0.98765, "loss_recovered": 1.0}
SAE_ID = "gpt2_small_layer_11_gated_l1_coefficient_0.0035_seed_1"


def printed(parts: list[Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return console.export_text()


def cells(text: str) -> str:
    """The text of a table, column by column, as if nothing had been folded."""
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return "\n".join("".join(part.strip() for part in column) for column in zip(*rows))


@WIDTHS
def test_list_shows_every_name_and_number(width: int) -> None:
    sae: dict[str, Any] = {
        **NUMBERS,
        "sae_id": SAE_ID,
        "architecture": "batchtopk",
        "hook_name": "transformer.h.11.hook_resid_post",
        "d_in": 4096,
        "d_sae": 131_072,
    }
    text = printed(saes_table([sae]), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for whole in ("4321.5", "100.00%", "0.9877", "γ"):
        assert whole in text
    for folded in (SAE_ID, "transformer.h.11.hook_resid_post", "batchtopk"):
        assert folded in cells(text)
    undefined = {**sae, "l0": None, "loss_recovered": None, "gamma": None}
    assert printed(saes_table([undefined]), width).count("none") == 3


@WIDTHS
def test_a_sweep_shows_what_distinguishes_its_points(width: int) -> None:
    point = {**NUMBERS, "label": "gated", "seed": 0, "dead_share": 0.5, "target_l0": None}
    settings = {"l1_coefficient": 1.25, "sparsity_loss": "norm_weighted_l1"}
    failure = {"label": "prolu", "seed": 7, "settings": {"k": 3}, "error": "Out of luck: " * 20}
    points: list[dict[str, Any]] = [
        {**point, "settings": settings, "l1_coefficient": 1.25},
        {**point, "settings": {}, "l1_coefficient": 0.75},
        {**point, "settings": {}, "l1_coefficient": 2.3456, "target_l0": 32},
        {**point, "settings": {}, "l1_coefficient": None},
        failure,
    ]
    table, *lines = sweep_table("out", points)
    text = printed([table], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    shown = cells(text)
    for setting in ("l1_coefficient=1.25", "sparsity_loss=norm_weighted_l1", "target_l0=32"):
        assert setting in shown
    assert "l1_coefficient=0.75" in shown
    assert "2.3456" not in shown
    assert "k=3(failed)" in shown.replace(" ", "")
    assert text.count("50.00%") == text.count("0.9877") == 4
    assert lines[0] == f"failed: prolu, k=3, seed 7: {failure['error']}"


@WIDTHS
def test_a_toy_and_an_encoder_gap_fit(width: int) -> None:
    shares = dict.fromkeys(("firing_precision", "firing_recall", "features_found"), 1.0)
    sae = {**NUMBERS, **shares, "label": "label " * 20, "composites_found": None, "true_l0": 2.0}
    sae |= {"settings": {}, "seed": 0, "f1": 0.8123, "mcc": 0.7, "explained_variance": 0.9}
    sae["dead_share"] = 0.0
    toy = {"num_features": 4, "hidden_dim": 8, "path": "out", "saes": [sae]}
    text = printed(toy_table(toy)[1:2], width)
    assert max(map(len, text.splitlines())) <= width
    for whole in ("4321.50", "100% / 100%", "none", "0.9877"):
        assert whole in text
    failure = {"label": "topk", "seed": 1, "settings": {"k": 3}, "error": "it diverged."}
    seeds = [sae, {**sae, "seed": 1, "settings": {"l1_coefficient": 0.25}}, failure]
    table, *lines = toy_table({**toy, "saes": seeds})[1:]
    text = printed([table], width)
    assert max(map(len, text.splitlines())) <= width
    assert "0.812" in text
    assert "l1_coefficient=0.25" in cells(text)
    assert lines[0] == "failed: topk, k=3, seed 1: it diverged."
    assert toy_table({**toy, "saes": [failure]})[0] == lines[0]
    codes = dict.fromkeys(("encoder", "refit", "pursuit"), NUMBERS)
    shown = printed(gap_table({**codes, "shares": None, "tokens": 9, "seconds": 1}), width)
    assert "its support, refitted" in shown
    assert "How the error divides is not defined here" in shown


@WIDTHS
def test_plugins_names_what_each_brings(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = call("plugins").stdout
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    shown = cells(text)
    for info in registry().plugins:
        assert info.module in shown
        for names in info.brings.values():
            for name in names:
                assert name in shown


def test_no_two_measures_share_a_heading() -> None:
    assert len({measure.heading for measure in MEASURES.values()}) == len(MEASURES)
