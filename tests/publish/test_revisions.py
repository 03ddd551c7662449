"""Another branch, tag or commit of a repository: it is loaded and measured like the main one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from support.local_hub import LocalHub
from typer.testing import CliRunner

from sae_gated_plugin.cli.commands import app
from sae_gated_plugin.errors import ArtifactError, ConfigError
from sae_gated_plugin.measure.evaluate import evaluate
from sae_gated_plugin.publish import hub
from sae_gated_plugin.saes.load import load_sae

REPO = "tester/saes"


@pytest.fixture
def branched(server: LocalHub, api: HfApi, runs: dict[str, Path]) -> str:
    """`v2` has the gated run under a name that main gives to ProLU; returns v2's commit."""
    hub.push([runs["prolu"]], REPO, names=["sae"], form="native", api=api)
    return str(hub.push([runs["gated"]], REPO, names=["sae"], revision="v2", api=api)["commit"])


def test_a_branch_or_a_commit_is_loaded(branched: str, runs: dict[str, Path]) -> None:
    assert load_sae(REPO, sae_id="sae").cfg.architecture() == "prolu"
    expected = load_sae(runs["gated"])
    for revision in ("v2", branched):
        sae = load_sae(REPO, sae_id="sae", revision=revision)
        assert sae.cfg.architecture() == "gated"
        assert torch.equal(sae.W_enc, expected.W_enc)


def test_one_at_the_root_of_a_branch(
    server: LocalHub, api: HfApi, branched: str, runs: dict[str, Path]
) -> None:
    for name in ("cfg.json", "sae_weights.safetensors"):
        content = (runs["gated"] / name).read_bytes()
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO, revision="v2")
    assert load_sae(REPO, sae_id=".", revision="v2").cfg.architecture() == "gated"


def test_eval_measures_a_revision(branched: str, runs: dict[str, Path]) -> None:
    arguments = ["eval", REPO, "--sae-id", "sae", "--revision", "v2", "--tokens", "512", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    found, expected = json.loads(done.stdout), evaluate(runs["gated"], tokens=512)
    assert found["l0"] == expected["l0"]
    assert found["fvu"] == expected["fvu"]
    assert found["path"] == f"{REPO}/sae@v2"


def test_encoder_gap_measures_a_revision(
    branched: str, tmp_path: Path, runs: dict[str, Path]
) -> None:
    output = tmp_path / "gap.json"
    arguments = ["encoder-gap", REPO, "--sae-id", "sae", "--revision", "v2", "--tokens", "128"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.stderr
    found = json.loads(output.read_text())
    assert (found["architecture"], found["path"]) == ("gated", f"{REPO}/sae@v2")
    assert found["encoder"]["l0"] == evaluate(runs["gated"], tokens=128)["l0"]


def test_what_is_not_there_is_a_sentence(branched: str, runs: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match=r"'v3'.*'tester/saes'|'tester/saes'.*'v3'"):
        load_sae(REPO, sae_id="sae", revision="v3")
    with pytest.raises(ArtifactError, match="no SAE 'other' at revision 'v2' of 'tester/saes'"):
        load_sae(REPO, sae_id="other", revision="v2")
    with pytest.raises(ConfigError, match="--sae-id"):
        load_sae(runs["gated"], revision="v2")
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        load_sae("gpt2-small-res-jb", sae_id="blocks.8.hook_resid_pre", revision="v2")
    done = CliRunner().invoke(app, ["eval", REPO, "--sae-id", "sae", "--revision", "v3"])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1, done.stderr
