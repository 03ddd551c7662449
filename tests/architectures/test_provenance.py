"""Who trained an SAE, by which loss, is in its files; that SAELens's config means ours is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.test_cli import call
from support.interpreter import Interpreter
from support.local_hub import LocalHub
from support.runs import run

from sae_gated_plugin import __version__
from sae_gated_plugin.publish.convert import export

BY = f"sae-gated-plugin {__version__}"

RUNNERS = """
import logging, sys
import sae_lens
from sae_lens import GatedTrainingSAEConfig, LanguageModelSAERunnerConfig, LoggingConfig
from sae_gated_plugin import packaged
sae = GatedTrainingSAEConfig(d_in=128, d_sae=256)
for _ in range(2):
    sae_lens.LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(
        sae=sae, model_name=packaged("model_name"), model_class_name="AutoModelForCausalLM",
        hook_name="model.layers.2", dataset_path=packaged("dataset_path"),
        is_dataset_tokenized=False, dataset_trust_remote_code=False, prepend_bos=False,
        context_size=128, logger=LoggingConfig(log_to_wandb=False), device="cpu",
    ))
"""
OBJECT = """
import sae_lens
from sae_lens.registry import get_sae_training_class
for _ in range(2):
    get_sae_training_class("gated")[0](sae_lens.GatedTrainingSAEConfig(d_in=4, d_sae=8))
"""
OURS = """
import sae_lens
from sae_gated_plugin import GatedTrainingSAEConfig
from sae_lens.registry import get_sae_training_class
get_sae_training_class("gated")[0](GatedTrainingSAEConfig(d_in=4, d_sae=8))
sae_lens.GatedTrainingSAEConfig(d_in=4, d_sae=8)
sae_lens.StandardTrainingSAEConfig(d_in=4, d_sae=8)
"""


@pytest.mark.parametrize(("script", "times"), [(RUNNERS, 1), (OBJECT, 1), (OURS, 0)])
def test_saelens_config_that_means_ours_is_said_once_on_stderr(
    script: str, times: int, interpreter: Interpreter
) -> None:
    done = interpreter.run(script)
    assert done.returncode == 0, done.stderr
    said = f"sae_lens.GatedTrainingSAEConfig trains the gated of {BY} here"
    assert done.stderr.count(said) == times


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "frozen auxiliary decoder, decoder rows of norm 1"),
        (
            {"aux_decoder": "trainable", "decoder": "norm_weighted"},
            "trainable auxiliary decoder, free decoder norms that weight the penalty",
        ),
    ],
)
def test_the_files_name_plugin_version_and_loss(
    small_run: dict[str, Any], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    small_run["sae"].update(options)
    run(small_run, tmp_path / "run", "training_tokens=2048", "n_checkpoints=1")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    for file in (tmp_path / "run" / "cfg.json", checkpoint / "cfg.json"):
        details = json.loads(file.read_text())["metadata"]["training_architecture_details"]
        assert details["plugin"] == BY
        assert details["loss"] == f"Gated SAE (Rajamanoharan et al. 2024), {words}"
    runner = json.loads((tmp_path / "run" / "runner_cfg.json").read_text())
    assert BY in json.dumps(runner["sae"]["metadata"])


def test_plain_saelens_loads_it(trained_run: Path, interpreter: Interpreter) -> None:
    script = f"""
import sys
from sae_lens import SAE
sae = SAE.load_from_disk({str(trained_run)!r})
assert "sae_gated_plugin" not in sys.modules
print(type(sae).__module__, sae.cfg.metadata.training_architecture_details["plugin"])
"""
    done = interpreter.run(script, SAE_GATED_PLUGIN_AUTOLOAD="0")
    assert done.stdout.strip() == f"sae_lens.saes.gated_sae {BY}", done.stderr


def test_card_and_list_show_it(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalHub() as server:
        server.patch_client(monkeypatch, tmp_path / "home")
        pushed = call("push", trained_run, "--repo", "tester/saes", "--name", "a")
        assert pushed.exit_code == 0, pushed.output
        assert f"Trained with {BY}: a" in call("list", "tester/saes").stdout
        files = server.files("tester/saes")
    assert f"decoder rows of norm 1, by {BY}; λ" in files["README.md"].decode()


def test_what_is_published_names_the_l0_of_training_so(trained_run: Path, tmp_path: Path) -> None:
    """SAELens's `l0` is of the last window of training, which may reach back to its first step."""
    there = json.loads((trained_run / "cfg.json").read_text())["metadata"]["l0"]
    held_out = json.loads((trained_run / "results.json").read_text())["l0"]
    assert abs(there - held_out) > 1
    for form in ("native", "jumprelu"):
        export(trained_run, tmp_path / form, form)
        metadata = json.loads((tmp_path / form / "cfg.json").read_text())["metadata"]
        assert "l0" not in metadata
        assert metadata["l0_in_last_training_window"] == there
