"""The card: a pure function of configurations and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.local_hub import check_card

from sae_gated_plugin.publish.card import BEGIN, END, Card, Entry, code, escape, render

GOLDEN = Path(__file__).parent / "golden_card.md"

CONFIG: dict[str, Any] = {
    "architecture": "gated",
    "d_in": 512,
    "d_sae": 8192,
    "metadata": {
        "model_name": "EleutherAI/pythia-70m-deduped",
        "dataset_path": "monology/pile-uncopyrighted",
        "hook_name": "blocks.3.hook_resid_post",
        "training_architecture": "gated",
        "l1_coefficient_reached": 2.56,
        "training_architecture_details": {
            "aux_decoder": "frozen",
            "decoder": "unit_norm",
            "learn_r_mag": True,
            "tie_encoders": True,
            "sparsity_loss": "l1",
            "l1_coefficient": 1.0,
            "target_l0": 32.0,
        },
    },
}
RESULTS: dict[str, Any] = {
    "architecture": "gated",
    "tokens": 200_000,
    "training_tokens": 1_500_000,
    "split": "validation",
    "dataset": "monology/pile-uncopyrighted",
    "l0": 31.9,
    "fvu": 0.1234,
    "gamma": 0.999,
    "gamma_ci": [0.998, 1.0],
    "loss_recovered": 0.9876,
    "nats_lost": 0.05,
    "dead_share": 0.001,
    "undefined": {},
    "versions": {"sae-lens": "6.54.12", "torch": "2.13.0"},
}
FIGURES = {f"figures/{name}.png": f"The {name}" for name in ("gamma", "fvu", "dead_share", "b_mag")}
RUN = {"model_name": "EleutherAI/pythia-70m-deduped", "lr": 3e-4}


def entry(**changes: Any) -> Entry:
    return Entry(
        **{"sae_id": "layer_3", "config": CONFIG, "results": RESULTS, "run": RUN, **changes}
    )


def html(card: str) -> str:
    """As a page shows it: HTML in the text stays HTML, so that it would be seen here."""
    body = card.split("---\n", 2)[2]
    return MarkdownIt("commonmark").enable("table").render(body)


def test_the_card_is_what_it_was() -> None:
    """A golden file; after a wanted change, `python -m publish.test_model_card` writes it anew."""
    other = entry(sae_id="layer_4", results=None, run=None)
    card = Card("me/pythia-saes", [other, entry()], FIGURES, "mit")
    assert render(card) == GOLDEN.read_text(encoding="utf-8")


def test_what_stands_where() -> None:
    """Sentences and table, then how to use it, then two figures side by side, the rest as links."""
    card = Card("me/pythia-saes", [entry()], FIGURES, "mit")
    text = render(card)
    places = [text.index(part) for part in ("A sparse", "| SAE |", "## Load", "| ![", "More fig")]
    assert places == sorted(places)
    page = html(text)
    assert page.count("<img") == 2
    row = page[page.index("<img") : page.index("More figures")]
    assert "The gamma</td>\n<td>The fvu</td>" in row
    assert page.count('<a href="figures/') == 2


def test_front_matter_passes_the_hubs_rules() -> None:
    metadata, errors, warnings = check_card(render(Card("me/x", [entry()], license="mit")))
    assert errors == warnings == []
    assert metadata["base_model"] == ["EleutherAI/pythia-70m-deduped"]
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics}["gamma"] == 0.999


def test_a_missing_number_is_said_to_be_missing() -> None:
    undefined = {**RESULTS, "gamma": None, "gamma_ci": None}
    undefined["undefined"] = {"gamma": "Every reconstruction is zero."}
    text = render(Card("me/x", [entry(results=undefined), entry(sae_id="b", results=None)]))
    assert "`layer_3` has no gamma: Every reconstruction is zero." in text
    assert "`b` has not been measured." in text
    row = next(line for line in text.splitlines() if line.startswith("| `b` |"))
    assert row.count("not measured") == 6
    assert not any(character.isdigit() for character in row.split("8192")[1])
    assert "No licence has been stated" in text


def test_a_card_without_anything_known_still_renders() -> None:
    text = render(Card("me/x", [Entry("a", {})]))
    for part in ("a model that its configuration does not name", "no λ", "Versions were not"):
        assert part in text


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a|b", "*bold* _it_ [l](http://x)", "`tick`", "a\n# b"]
)
def test_names_are_shown_as_they_are(name: str) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["metadata"].update(model_name=name, dataset_path=name, hook_name=name)
    text = render(Card("me/x", [entry(config=config, run={"model_name": name})]))
    page = html(text)
    for tag in ("<script", "<em>it", "<em>bold", "<strong>", 'href="http://x', "<h1>b"):
        assert tag not in page
    assert check_card(text)[1] == []
    assert page.count("<td>") == 9  # one row: a bar in a name opens no column


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_name_is_one_line_of_plain_text(name: str) -> None:
    shown = " ".join(name.split())
    for rendered in (f"x {escape(name)} y", f"x {code(name)} y" if shown else "x y"):
        page = MarkdownIt("commonmark").render(rendered)
        assert page.count("<p>") == 1
        for tag in ("<h", "<em", "<strong", "<a", "<img", "<ul", "<script", "<br"):
            assert tag not in page


def test_rendering_again_changes_nothing_and_keeps_hand_written_parts() -> None:
    card = Card("me/x", [entry()])
    first = render(card)
    assert render(card, first) == first
    edited = first.replace(BEGIN, f"By hand, above.\n\n{BEGIN}").replace(END, f"{END}\n\nBelow.")
    edited = edited.replace("---\n", "---\nthumbnail: t.png\n", 1)
    again = render(Card("me/x", [entry(), entry(sae_id="layer_4")]), edited)
    assert "By hand, above." in again
    assert again.rstrip().endswith("Below.")
    assert yaml.safe_load(again.split("---\n")[1])["thumbnail"] == "t.png"
    assert "`layer_4`" in again


def test_a_card_that_was_there_before_is_kept_below() -> None:
    theirs = "---\nlicense: apache-2.0\n---\n\n# Theirs\n"
    text = render(Card("me/x", [entry()]), theirs)
    assert text.index(END) < text.index("# Theirs")
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "apache-2.0"


if __name__ == "__main__":
    second = entry(sae_id="layer_4", results=None, run=None)
    GOLDEN.write_text(render(Card("me/pythia-saes", [second, entry()], FIGURES, "mit")), "utf-8")
