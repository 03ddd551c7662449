"""Publishing with the real huggingface_hub client over HTTP, to a Hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from sae_lens import SAE
from support.hub_records import REPO
from support.local_hub import LocalHub
from typer.testing import CliRunner

from sae_gated_plugin.cli.commands import app
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ArtifactError, ConfigError, HubError
from sae_gated_plugin.measure.evaluate import evaluate
from sae_gated_plugin.publish import hub
from sae_gated_plugin.publish.clean import clean
from sae_gated_plugin.saes.load import load_sae
from sae_gated_plugin.training.run import train


def test_one_commit_holds_everything_and_a_second_push_sends_nothing(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    done = hub.push(list(runs.values()), REPO, api=api)
    assert len(server.calls("POST", "/commit/")) == 1
    files = server.files(REPO)
    for name, weights in (("gated_layer_2", "gated"), ("prolu_layer_2", "jumprelu")):
        present = {path.split("/")[1] for path in files if path.startswith(f"{name}/")}
        assert present == {
            "cfg.json",
            "sae_weights.safetensors",
            "sparsity.safetensors",
            "runner_cfg.json",
            "run.yaml",
            "results.json",
        }
        assert json.loads(files[f"{name}/cfg.json"])["architecture"] == weights
    assert any(path.startswith("figures/") and path.endswith(".png") for path in files)
    assert done["commit"] == server.repos[REPO].find("main").oid
    assert set(done["sent"]) == set(done["files"]) == set(files) - {".gitattributes"}

    again = hub.push(list(runs.values()), REPO, api=api)
    assert again["sent"] == []
    assert again["commit"] == done["commit"]
    assert len(server.calls("POST", "/commit/")) == 1
    assert len(server.calls("PUT", "")) == len(
        {files[path] for path in files if path.endswith(".safetensors")}
    )


def test_another_layer_later_updates_the_table_and_keeps_what_was_written_by_hand(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    hub.push([runs["gated"]], REPO, api=api)
    card = server.files(REPO)["README.md"].decode()
    edited = card.replace("---\n\n<!--", "pipeline_note: mine\n---\n\nRead this first.\n\n<!--", 1)
    server.commit(REPO, {"README.md": (edited + "\nMore by hand.\n").encode()})
    hub.push([runs["prolu"]], REPO, api=api)
    text = server.files(REPO)["README.md"].decode()
    for part in ("`gated_layer_2`", "`prolu_layer_2`", "Read this first.", "More by hand."):
        assert text.count(part) >= 1, part
    assert "pipeline_note: mine" in text
    assert text.index("Read this first.") < text.index("| SAE |") < text.index("More by hand.")
    assert hub.push([runs["gated"], runs["prolu"]], REPO, api=api)["sent"] == []


def test_list_says_what_a_repository_holds(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    hub.push(list(runs.values()), REPO, api=api)
    listed = hub.list_saes(REPO, api=api)
    assert [(row["sae_id"], row["architecture"]) for row in listed] == [
        ("gated_layer_2", "gated"),
        ("prolu_layer_2", "jumprelu"),
    ]
    results = json.loads((runs["gated"] / "results.json").read_text())
    for name in ("l0", "gamma", "gamma_ci", "loss_recovered"):
        assert listed[0][name] == results[name]


def test_pull_request_and_private(server: LocalHub, api: HfApi, runs: dict[str, Path]) -> None:
    done = hub.push([runs["gated"]], REPO, private=True, create_pr=True, api=api)
    assert "discussions/1" in done["pull_request"]
    assert server.repos[REPO].private
    assert "README.md" not in server.files(REPO)


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("revision", ["v2", "main"])
def test_the_cards_snippet_loads_what_was_pushed_there(
    server: LocalHub, api: HfApi, runs: dict[str, Path], revision: str
) -> None:
    hub.push([runs["gated"]], REPO, revision=revision, api=api)
    assert ("README.md" in server.files(REPO)) == (revision == "main")
    expected = SAE.load_from_disk(runs["gated"])
    (snippet,) = snippets(server.files(REPO, revision)["README.md"].decode())
    pytest.importorskip("transformer_lens.model_bridge")  # TransformerLens 3, as the snippet
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    assert torch.equal(scope["sae"].W_enc, expected.W_enc)
    assert scope["reconstruction"].shape == (4, 128)
    model, tokens = (scope["model"].original_model, scope["model"].to_tokens("Some text"))
    layers = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(scope["on_text"], expected.encode(layers[3]), rtol=1e-3, atol=1e-3)


def test_names_for_runs_whose_folders_cannot_be_names(
    server: LocalHub, api: HfApi, runs: dict[str, Path], tmp_path: Path
) -> None:
    """A space, and two folders of one name."""
    folders = [shutil.copytree(runs["gated"], tmp_path / part / "my run") for part in "ab"]
    with pytest.raises(ConfigError, match="'my run' cannot be an SAE's name"):
        hub.push(folders[:1], REPO, api=api)
    arguments = ["push", *map(str, folders), "--repo", REPO, "--name", "a", "--name", "b"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert [row["sae_id"] for row in hub.list_saes(REPO, api=api)] == ["a", "b"]


def test_an_old_configuration_and_one_at_the_root_are_listed(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    """SAELens 3 had no metadata and said hook_point; others keep one SAE at the root."""
    old = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre"}
    old |= {"d_in": 768, "d_sae": 24576, "dataset_path": "Skylion007/openwebtext"}
    hub.push([runs["gated"]], REPO, api=api)
    config = server.files(REPO)["gated_layer_2/cfg.json"]
    server.commit(REPO, {"old/cfg.json": json.dumps(old).encode(), "cfg.json": config})
    root, ours, theirs = hub.list_saes(REPO, api=api)
    assert (root["sae_id"], root["d_sae"], ours["sae_id"]) == (".", 256, "gated_layer_2")
    assert (theirs["architecture"], theirs["hook_name"]) == ("standard", "blocks.8.hook_resid_pre")
    assert "│ ." in CliRunner().invoke(app, ["list", REPO]).stdout
    hub.push([runs["prolu"]], REPO, api=api)
    card = server.files(REPO)["README.md"].decode()
    assert "`gpt2-small`" in card
    assert "| `old` | `blocks.8.hook_resid_pre` | 768 → 24576 |" in card


def test_the_packaged_model_is_found_again_from_the_hub(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    hub.push([runs["gated"]], REPO, api=api)
    sae = SAE.from_pretrained(REPO, "gated_layer_2")
    assert sae.cfg.metadata.model_name == sae.cfg.metadata.dataset_path == "quickstart"
    there, here = (evaluate(source, tokens=512) for source in (sae, runs["gated"]))
    assert there["l0"] == here["l0"]
    assert there["model_name"] == there["dataset"] == "quickstart"


@pytest.mark.parametrize(
    ("model", "option", "warned"),
    [("my-model", None, True), ("my-model", "org/lm", False), ("org/lm", None, False)],
)
def test_a_missing_base_model_is_said_once(
    runs: dict[str, Path], tmp_path: Path, caplog: Any, model: str, option: Any, warned: bool
) -> None:
    runs_ = [Path(shutil.copytree(runs["gated"], tmp_path / name)) for name in "ab"]
    for run in runs_:
        config = json.loads((run / "cfg.json").read_text())
        config["metadata"]["model_name"] = model
        (run / "cfg.json").write_text(json.dumps(config))
    hub.push(runs_, REPO, base_model=option, dry_run=tmp_path / "dry")
    said = [record.message for record in caplog.records if "--base-model" in record.message]
    assert len(said) == warned
    assert all("no base model for 'my-model'" in text for text in said)


def test_dry_run_writes_what_a_push_would_send(
    server: LocalHub, api: HfApi, runs: dict[str, Path], tmp_path: Path
) -> None:
    hub.push([runs["gated"]], REPO, license="mit", api=api)
    before = len(server.requests)
    done = hub.push([runs["prolu"]], REPO, dry_run=tmp_path / "dry", license="mit", api=api)
    assert {request.method for request in server.requests[before:]} <= {"GET", "HEAD"}
    assert done["based_on"] == server.repos[REPO].find("main").oid
    hub.push([runs["prolu"]], REPO, license="mit", api=api)
    written = {
        str(p.relative_to(tmp_path / "dry")): p.read_bytes()
        for p in (tmp_path / "dry").rglob("*")
        if p.is_file()
    }
    sent = server.files(REPO)
    assert written == {path: sent[path] for path in done["files"]}
    assert set(sent) - set(written) - {".gitattributes"} == {
        path for path in sent if path.startswith("gated_layer_2/")
    }


def test_dry_run_needs_no_hub(runs: dict[str, Path], tmp_path: Path) -> None:
    done = hub.push([runs["gated"]], REPO, dry_run=tmp_path / "dry")
    assert done["based_on"] is None
    assert (tmp_path / "dry" / "README.md").exists()
    with pytest.raises(ConfigError, match="is not empty; nothing was changed"):
        hub.push([runs["gated"]], REPO, dry_run=tmp_path / "dry")


# --- loading it in a new process ------------------------------------------------------------------

LOAD = """
import json, sys, torch
from sae_lens import SAE
repo, names, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
assert "sae_gated_plugin" not in sys.modules
x = torch.load(folder + "/x", weights_only=True)
for name in names:
    sae = SAE.from_pretrained(repo, name)
    with torch.no_grad():
        torch.save((sae.encode(x), sae(x)), folder + "/" + name + ".out")
"""


def test_what_was_pushed_loads_without_the_plugin_with_an_empty_cache(
    server: LocalHub, api: HfApi, runs: dict[str, Path], tmp_path: Path
) -> None:
    """In a new process; that SAELens with the plugin loads by name is in test_mlp_encoder.py."""
    as_jumprelu = tmp_path / "gated_as_jumprelu"
    shutil.copytree(runs["gated"], as_jumprelu)
    hub.push([runs["gated"], runs["prolu"]], REPO, api=api)
    hub.push([as_jumprelu], REPO, form="jumprelu", api=api)
    architectures = {row["sae_id"]: row["architecture"] for row in hub.list_saes(REPO, api=api)}
    assert architectures == {
        "gated_layer_2": "gated",
        "prolu_layer_2": "jumprelu",
        "gated_as_jumprelu": "jumprelu",
    }
    x = 10 * torch.randn(256, 128)
    torch.save(x, tmp_path / "x")
    environment = server.environment(tmp_path / "empty-home") | {"SAE_GATED_PLUGIN_AUTOLOAD": "0"}
    command = [sys.executable, "-c", LOAD, REPO, json.dumps(list(architectures)), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    for name, run in zip(sorted(architectures), (as_jumprelu, runs["gated"], runs["prolu"])):
        trained = SAE.load_from_disk(run)
        acts, x_hat = torch.load(tmp_path / f"{name}.out", weights_only=True)
        with torch.no_grad():
            expected, expected_x_hat = trained.encode(x), trained(x)
        scale = expected.abs().max()
        torch.testing.assert_close(acts / scale, expected / scale, rtol=0, atol=1e-6)
        torch.testing.assert_close(x_hat / scale, expected_x_hat / scale, rtol=0, atol=1e-6)


# --- nothing private ------------------------------------------------------------------------------


def test_no_token_and_no_local_path_leaves_the_machine(
    server: LocalHub, api: HfApi, runs: dict[str, Path], tmp_path: Path, caplog: Any
) -> None:
    secret = "hf_" + "s3cretS3cret" * 3
    run = tmp_path / "leaky"
    shutil.copytree(runs["gated"], run)
    for name in ("cfg.json", "runner_cfg.json", "results.json"):
        value = json.loads((run / name).read_text())
        value["note"] = f"trained in {run}/deep by {secret}"
        value["cached_activations_path"] = "/somewhere/cache"
        value.setdefault("metadata", {})["model_name"] = str(tmp_path / "models" / "my-model")
        value["model_kwargs"] = {"cache": [f"{Path.home()}/cache", "../up/there", "~/x"]}
        (run / name).write_text(json.dumps(value))
    with caplog.at_level("DEBUG"):
        hub.push([run], REPO, api=api)
    forbidden = [secret, server.token, str(tmp_path), str(runs["gated"].parent), os.getcwd()]
    forbidden += ["/somewhere", f"{Path.home()}/cache", "../up", "~/x", sys.prefix]
    sent = [*server.received(), *server.files(REPO).values(), caplog.text.encode()]
    for part in sent:
        for word in forbidden:
            assert word.encode() not in part, word
    cfg = json.loads(server.files(REPO)["leaky/cfg.json"])
    assert cfg["metadata"]["model_name"] == "my-model"
    assert "wandb" not in server.files(REPO)["leaky/runner_cfg.json"].decode()


def test_names_on_the_hub_replace_folders(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    hub.push([runs["gated"]], REPO, base_model="org/tiny-lm", dataset="org/text", api=api)
    cfg = json.loads(server.files(REPO)["gated_layer_2/cfg.json"])
    assert cfg["metadata"]["model_name"] == "org/tiny-lm"
    assert cfg["metadata"]["dataset_path"] == "org/text"
    card = server.files(REPO)["README.md"].decode()
    assert "base_model:\n- org/tiny-lm" in card
    assert "datasets:\n- org/text" in card


def test_clean_leaves_names_alone() -> None:
    for name in ("gpt2", "EleutherAI/pythia-70m", "blocks.3.hook_resid_post", "a sentence. Or two"):
        assert clean({"x": [name]}) == {"x": [name]}


def test_bad_input_is_a_sentence(
    server: LocalHub, api: HfApi, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        hub.push([tmp_path / "none"], REPO, api=api)
    bare = tmp_path / "bare"
    shutil.copytree(runs["gated"], bare)
    (bare / "results.json").unlink()
    with pytest.raises(ArtifactError, match=rf"has no results.json.*sae-gated eval {bare} --json"):
        hub.push([bare], REPO, api=api)
    with pytest.raises(HubError, match="does not let you write to 'other/saes'"):
        hub.push([runs["gated"]], "other/saes", api=api)
    for name in ("saes", "a/b/c", "-x/y", "a b/c", "tester/..x"):
        with pytest.raises(ConfigError, match="is no repository's name"):
            hub.push([runs["gated"]], name, api=api)
    with pytest.raises(ConfigError, match=r"same folder name.*--name"):
        hub.push([runs["gated"], runs["gated"]], REPO, api=api)
    with pytest.raises(ConfigError, match=r"There are 1 names \(--name\) for 2 runs"):
        hub.push([runs["gated"], runs["prolu"]], REPO, names=["one"], api=api)
    for name in ("my layer", "..", "a/b"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot be an SAE's name.*--name"):
            hub.push([runs["gated"]], REPO, names=[name], api=api)
    with pytest.raises(ConfigError, match="form is 'onnx'"):
        hub.push([runs["gated"]], REPO, form="onnx", api=api)
    with pytest.raises(HubError, match="There is no repository 'tester/nothing'"):
        hub.list_saes("tester/nothing", api=api)
    with pytest.raises(HubError, match="log in with `hf auth login`"):
        hub.push(
            [runs["gated"]], REPO, api=HfApi(endpoint=server.endpoint, token="hf_wrongwrongwrong")
        )
    assert REPO not in server.repos


def test_offline_is_a_sentence(runs: dict[str, Path]) -> None:
    for ask in (lambda: hub.push([runs["gated"]], REPO), lambda: hub.list_saes(REPO)):
        with pytest.raises(HubError, match=f"offline: unset HF_HUB_OFFLINE to reach '{REPO}'"):
            ask()


def test_an_unreachable_hub_is_a_sentence(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with LocalHub() as gone:
        api = gone.patch_client(monkeypatch, tmp_path)
    monkeypatch.setattr("sae_gated_plugin.publish.client.WAITS", (0.01,))
    with pytest.raises(HubError, match="could not be reached"):
        hub.push([runs["gated"]], REPO, api=api)


def test_unmeasured_runs_say_so(
    server: LocalHub, api: HfApi, runs: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(runs["gated"], bare)
    (bare / "results.json").unlink()
    hub.push([bare], REPO, unmeasured=True, api=api)
    card = server.files(REPO)["README.md"].decode()
    assert "not measured" in card
    assert "`bare` has not been measured." in card
    assert "model-index" not in card


def test_the_advice_for_an_unmeasured_run_measures_it(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shell, from another folder, though a folder's name has a space."""
    bare = tmp_path / "my runs" / "bare"
    shutil.copytree(runs["gated"], bare)
    (bare / "results.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        hub.push([bare], REPO, dry_run=tmp_path / "dry")
    (command,) = re.findall(r"Measure it \((.*)\), or", str(caught.value))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    command = command.replace("--json", "--tokens 512 --json")
    subprocess.run(command, shell=True, cwd=tmp_path / "elsewhere", check=True, timeout=200)
    assert not list((tmp_path / "elsewhere").iterdir())
    hub.push([bare], REPO, dry_run=tmp_path / "dry")
    assert json.loads((tmp_path / "dry" / "bare" / "results.json").read_text())["l0"] > 0


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_a_checkpoint_is_published_in_its_inference_form(
    small_run: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    """`relu` is a training name alone, and the checkpoint's weights expect scaled activations."""
    small_run["sae"].update(
        architecture=architecture, d_sae=64, normalize_activations="expected_average_only_in"
    )
    short = ["training_tokens=2048", "n_checkpoints=1", "n_batches_for_norm_estimate=2"]
    train(load_config(small_run, short), tmp_path / "run", eval_tokens=128)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    hub.push([checkpoint], REPO, dry_run=tmp_path / "dry", unmeasured=True)
    published = SAE.load_from_disk(tmp_path / "dry" / checkpoint.name)
    assert published.cfg.architecture() == {"relu": "standard"}.get(architecture, architecture)
    assert published.cfg.normalize_activations == "none"
    x = 10 * torch.randn(64, published.cfg.d_in)
    torch.testing.assert_close(published(x), load_sae(checkpoint)(x))

    (checkpoint / "activation_scaler.json").unlink()
    with pytest.raises(ArtifactError, match="neither folded into its weights nor stored"):
        hub.push([checkpoint], REPO, dry_run=tmp_path / "again", unmeasured=True)


def test_the_command_line(
    server: LocalHub, api: HfApi, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    pushed = call("push", str(runs["gated"]), "--repo", REPO)
    assert pushed.exit_code == 0, pushed.stderr
    assert "Pushed and read back:" in pushed.stdout
    assert "nothing was sent" in call("push", str(runs["gated"]), "--repo", REPO).stdout
    listed = call("list", REPO, "--json")
    assert json.loads(listed.stdout)[0]["sae_id"] == "gated_layer_2"
    monkeypatch.setenv("COLUMNS", "120")  # in 80 an id may fold
    assert "gated_layer_2" in call("list", REPO).stdout
    refused = call("push", str(runs["gated"]), "--repo", "other/saes")
    assert refused.exit_code == 2
    assert refused.stderr.count("Error: ") == 1
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("place", ["temporary folder", "cache"])
def test_a_full_disk_is_said_and_nothing_is_half_sent(
    place: str,
    server: LocalHub,
    api: HfApi,
    runs: dict[str, Path],
    mounted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.push([runs["gated"]], REPO, api=api)
    before = server.repos[REPO].find("main").oid
    disk = mounted("size=24k")
    if place == "cache":
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk))
        (disk / "filled").write_bytes(bytes(20_000))
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
    done = CliRunner().invoke(app, ["push", str(runs["prolu"]), "--repo", REPO])
    assert done.exit_code == 2, done.stderr
    assert "There is no room for the copies that a push makes" in done.stderr
    assert "no half of it was sent" in done.stderr
    assert server.repos[REPO].find("main").oid == before
