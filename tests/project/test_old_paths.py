"""Module paths of version 0.1: each name that was public leads to where it is now, and warns."""

from __future__ import annotations

import importlib
import re

import pytest

import sae_gated_plugin
from sae_gated_plugin import old_paths

# What version 0.1 had, by hand: a list made from the code would forget what the code forgot.
NAMES = {
    "activation_stream": "ActivationStream",
    "architectures.baselines": "ReLUTrainingSAEConfig",
    "architectures.thresholded": "ThresholdedTrainingSAE",
    "artifacts": "load_sae read_json",
    "checkpoints": "newest locked",
    "cli": "app main",
    "configuration": "load read_yaml RunConfig",
    "convert": "export check to_jumprelu",
    "dead_latents": "resample_if_due",
    "divergence": "DivergenceGuard",
    "evaluation": "evaluate read_activations open_text",
    "hook_points": "HookPoint first_line",
    "hookspecs": "hookimpl",
    "hub": "push list_saes clean WAITS",
    "loaders": "dictionary_learning_gated prolu_checkpoint",
    "losses": "l1 decoder_coherence",
    "metrics": "Gamma gamma FVU L0 Batch coherence",
    "model_card": "Card render",
    "plots": "draw cosine_heatmap",
    "plugins": "collect registry make_manager",
    "report": "write read compare frontier",
    "signals": "Signals",
    "sparse": "encode_active Support",
    "sparse_coding": "nnls kkt_breach",
    "sweeps": "load run Sweep",
    "toy": "load run",
    "training": "train resume quickstart Runner",
}
PATHS = [f"{module}.{name}" for module, names in NAMES.items() for name in names.split()]


@pytest.mark.parametrize("path", PATHS)
def test_an_old_name_leads_to_the_new_one(path: str) -> None:
    module, name = path.rsplit(".", 1)
    with pytest.warns(
        DeprecationWarning, match=rf"sae_gated_plugin\.{re.escape(path)} is now"
    ) as said:
        value = getattr(importlib.import_module(f"sae_gated_plugin.{module}"), name)
    new_module, new_name = str(said[0].message).split(" is now ")[1].split(";")[0].rsplit(".", 1)
    assert value is getattr(importlib.import_module(new_module), new_name)


def test_nothing_else_appears() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sae_gated_plugin.configurations")
    with pytest.raises(AttributeError, match=r"sae_gated_plugin\.hub' has no attribute 'pull'"):
        importlib.import_module("sae_gated_plugin.hub").pull  # noqa: B018
    assert set(old_paths.RENAMED) <= set(PATHS) | {"toy.match", "toy.measure"}


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("name", ["fista", "gradient_pursuit", "matching_pursuit", "refit"])
def test_a_room_that_kept_its_name_keeps_its_functions(name: str) -> None:
    importlib.import_module("sae_gated_plugin.sparse_coding.fista")  # must not hide the function
    assert callable(getattr(importlib.import_module("sae_gated_plugin.sparse_coding"), name))


def test_the_public_names_are_there() -> None:
    for name in sae_gated_plugin.__all__:
        assert getattr(sae_gated_plugin, name) is not None
    assert set(sae_gated_plugin.__all__) >= set(sae_gated_plugin._LAZY)
