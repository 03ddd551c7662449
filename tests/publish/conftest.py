"""A Hub on 127.0.0.1, a client for it, and two trained runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from support.local_hub import LocalHub
from support.runs import SMALL_RUN

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.training.run import train


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub() as running:
        yield running


@pytest.fixture
def api(server: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    monkeypatch.setattr("sae_gated_plugin.publish.client.WAITS", (0.01, 0.01, 0.01))
    return server.patch_client(monkeypatch, tmp_path / "home")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A gated run and a ProLU run, really trained on the packaged model."""
    folder = tmp_path_factory.mktemp("runs")
    changes = ["training_tokens=10240", "model_name=quickstart", "dataset_path=quickstart"]
    train(load_config(SMALL_RUN, changes), folder / "gated_layer_2")
    prolu = {"sae": {"architecture": "prolu", "d_in": 128, "d_sae": 256}}
    train(load_config({**SMALL_RUN, **prolu}, changes), folder / "prolu_layer_2")
    return {"gated": folder / "gated_layer_2", "prolu": folder / "prolu_layer_2"}
