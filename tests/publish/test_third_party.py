"""What a plugin's architecture says of itself becomes its export, its card and its report."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_gated_plugin import hookimpl
from sae_gated_plugin.errors import ArtifactError
from sae_gated_plugin.measure.evaluate import evaluate
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.plugins import bridge
from sae_gated_plugin.plugins.host import collect, make_manager
from sae_gated_plugin.plugins.records import About, Architecture
from sae_gated_plugin.publish.convert import export, to_jumprelu
from sae_gated_plugin.publish.hub import push

PLUGIN = Path(__file__).parents[1] / "support" / "third_party_plugin"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, hook_point: HookPoint, tmp_path: Path) -> Path:
    """The folder of a `stranger` SAE of the packaged model, measured."""
    monkeypatch.syspath_prepend(PLUGIN)
    manager = make_manager()
    manager.add(importlib.import_module("sae_stranger"), "sae-stranger", "1.2.3")
    found = collect(manager)
    own = found.architectures["stranger"]
    monkeypatch.setattr(bridge, "_active", found)
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "stranger", own.inference)
    monkeypatch.setitem(SAE_TRAINING_CLASS_REGISTRY, "stranger", own.training)
    sae_class, config_class = own.inference or pytest.fail("it has no inference form")
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=128, d_sae=256))
    sae.b_enc.data = torch.randn(256)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.context_size = hook_point.name, 64
    sae.cfg.metadata.prepend_bos = False
    sae.cfg.metadata.model_name = sae.cfg.metadata.dataset_path = "quickstart"
    sae.cfg.metadata.model_class_name = "AutoModelForCausalLM"
    sae.save_model(tmp_path / "layer_2")
    results = evaluate(tmp_path / "layer_2", model=hook_point.model, tokens=512)
    (tmp_path / "layer_2" / "results.json").write_text(json.dumps(results))
    assert set(results["histograms"]) == {"log10_latent_density", "b_enc"}
    return tmp_path / "layer_2"


def test_export_card_and_report_know_it(run: Path, tmp_path: Path) -> None:
    written = export(run, tmp_path / "jumprelu")
    assert (written["from"], written["architecture"]) == ("stranger", "jumprelu")
    assert written["checked_on"] == ["random activations", "real activations"]
    assert type(JumpReLUSAE.load_from_disk(tmp_path / "jumprelu")) is JumpReLUSAE
    done = push([run], "tester/saes", dry_run=tmp_path / "dry")
    assert "figures/histogram_b_enc.png" in done["files"]
    config = json.loads((tmp_path / "dry" / "layer_2" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"  # by itself: plain SAELens has no `stranger`
    card = (tmp_path / "dry" / "README.md").read_text()
    assert "SAELens alone (`pip install sae-lens`) loads it." in card
    push([run], "tester/saes", form="native", dry_run=tmp_path / "native")
    card = (tmp_path / "native" / "README.md").read_text()
    assert "Stranger SAE, 256 latents of its own" in card
    assert "SAELens alone" not in card


def broken(_: Any) -> Any:
    raise ZeroDivisionError("it divides")


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (None, "A stranger SAE cannot be converted to jumprelu: it declares no such form"),
        (About("x", jumprelu="Its latents inhibit each other."), "Its latents inhibit each other"),
        (About("x", jumprelu=broken), "jumprelu: ZeroDivisionError: it divides"),
        (About("x", jumprelu=lambda sae: (sae.W_enc, 3)), "cannot be converted to jumprelu: "),
    ],
)
def test_what_has_no_form_is_a_sentence(
    about: Any, sentence: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architectures = bridge.registry().architectures
    own = architectures["stranger"]
    monkeypatch.setitem(architectures, "stranger", Architecture(None, own.inference, about))
    with pytest.raises(ArtifactError, match=sentence):
        to_jumprelu(SAE_CLASS_REGISTRY["stranger"][0].load_from_disk(run))


def test_options_that_cannot_be_named_cost_no_push(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    architectures = bridge.registry().architectures
    own = Architecture(None, architectures["stranger"].inference, About("Odd SAE", broken))
    monkeypatch.setitem(architectures, "stranger", own)
    push([run], "tester/saes", dry_run=tmp_path / "dry")
    assert "Odd SAE; " in (tmp_path / "dry" / "README.md").read_text()
    assert "options of a stranger SAE are not named: ZeroDivisionError" in caplog.text


def test_what_is_not_about_an_architecture_is_a_failed_plugin() -> None:
    class Plugin:
        @hookimpl
        def register_architectures(self, register: Any) -> None:
            register("odd", inference=SAE_CLASS_REGISTRY["standard"], about="Odd SAE")

    manager = make_manager(load_entry_points=False)
    manager.add(Plugin(), "odd", "1.0")
    assert "about must be an About(…); got 'Odd SAE'" in str(collect(manager).plugins[0].error)
