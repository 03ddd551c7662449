"""Loading what others trained, through SAELens's own from_pretrained, from a Hub on 127.0.0.1."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from support.local_hub import LocalHub

from sae_gated_plugin import hookimpl
from sae_gated_plugin.architectures.prolu import ProLUSAE, prolu
from sae_gated_plugin.errors import ArtifactError
from sae_gated_plugin.plugins.host import Manager, collect
from sae_gated_plugin.plugins.records import Registry
from sae_gated_plugin.plugins.saelens_tables import hand_over
from sae_gated_plugin.saes import loaders

D_IN, D_SAE = 8, 24
REPO = "tester/theirs"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.patch_client(monkeypatch, tmp_path / "home")
        running.create(REPO)
        yield running


def saved(tensors: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def gated_tensors() -> dict[str, torch.Tensor]:
    """As dictionary_learning's GatedAutoEncoder saves itself: two linear layers and biases."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "decoder_bias": random(D_IN),
        "encoder.weight": random(D_SAE, D_IN),
        "r_mag": 0.3 * random(D_SAE),
        "gate_bias": random(D_SAE),
        "mag_bias": random(D_SAE),
        "decoder.weight": random(D_IN, D_SAE),
    }


def config(**changes: Any) -> bytes:
    """As its trainSAE writes it; a trainer may carry more, the buffer may be missing."""
    trainer = {
        "dict_class": "GatedAutoEncoder",
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
    }
    buffer = {"buffer": {"ctx_len": 128}} if changes.pop("with_buffer", True) else {}
    return json.dumps({"trainer": {**trainer, **changes}, **buffer}).encode()


def test_dictionary_learnings_gated_sae(server: LocalHub) -> None:
    tensors = gated_tensors()
    server.commit(REPO, {"l3/ae.pt": saved(tensors), "l3/config.json": config()})
    sae = SAE.from_pretrained(REPO, "l3", converter=loaders.dictionary_learning_gated)
    assert sae.cfg.architecture() == "gated"
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    x = torch.randn(50, D_IN)
    # Their forward pass, written out.
    pre = (x - tensors["decoder_bias"]) @ tensors["encoder.weight"].T
    gate = (pre + tensors["gate_bias"] > 0).float()
    expected = gate * (tensors["r_mag"].exp() * pre + tensors["mag_bias"]).relu()
    assert 0.1 < (expected > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)
    x_hat = expected @ tensors["decoder.weight"].T + tensors["decoder_bias"]
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("submodule", "hook_name"),
    [
        (None, "blocks.3.hook_resid_post"),
        ("resid_post_layer_3", "blocks.3.hook_resid_post"),
        ("mlp_out_layer_3", "blocks.3.hook_mlp_out"),
        ("mlp", "blocks.3.hook_mlp_out"),
        ("attn_out_layer3", "blocks.3.hook_attn_out"),
        ("attention_out", "blocks.3.hook_attn_out"),
        ("resid_mid_layer_3", None),
        ("embed", None),
    ],
)
def test_the_hook_point_of_a_submodule(
    submodule: str | None, hook_name: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From a folder on this disk, as `trainSAE` leaves it without a buffer."""
    (tmp_path / "trainer_0").mkdir()
    (tmp_path / "trainer_0" / "ae.pt").write_bytes(saved(gated_tensors()))
    written = config(with_buffer=False, submodule_name=submodule)
    (tmp_path / "trainer_0" / "config.json").write_bytes(written)
    load = loaders.dictionary_learning_gated
    sae = SAE.from_pretrained(str(tmp_path), "trainer_0/", converter=load)
    assert sae.cfg.metadata.hook_name == hook_name
    assert ("hook point is not known here" in caplog.text) == (hook_name is None)
    at_root = SAE.from_pretrained(str(tmp_path / "trainer_0"), "", converter=load)
    assert torch.equal(at_root.W_enc, sae.W_enc)


@pytest.mark.parametrize(
    ("repo", "folder", "sentence"),
    [
        (REPO, "checkpoints", r"no file 'tester/theirs/checkpoints/config.json'. It says what is"),
        (REPO, "", r"There is no file 'tester/theirs/config.json'"),
        (".", "none", r"There is no file './none/config.json'"),
        ("/not/here", "l3", r"'/not/here/l3/config.json' cannot be fetched.*OWNER/NAME, or a fol"),
        ("tester/none", "l3", r"'tester/none/l3/config.json' cannot be fetched: Repository"),
    ],
)
def test_what_is_not_there_is_a_sentence(
    server: LocalHub, repo: str, folder: str, sentence: str
) -> None:
    server.commit(REPO, {"checkpoints/ae.pt": saved(gated_tensors())})  # a backup, without config
    with pytest.raises(ArtifactError, match=sentence):
        loaders.dictionary_learning_gated(repo, folder)


@pytest.mark.parametrize("form", ["linear", "matrices", "nested"])
def test_a_prolu_checkpoint(server: LocalHub, form: str) -> None:
    W_enc, W_dec = torch.randn(D_IN, D_SAE), torch.randn(D_SAE, D_IN)
    b_enc, b_dec = torch.randn(D_SAE), torch.randn(D_IN)
    tensors: Any = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if form == "linear":
        tensors = {"encoder.weight": W_enc.T, "decoder.weight": W_dec.T}
        tensors |= {"encoder.bias": b_enc, "decoder.bias": b_dec}
    if form == "nested":
        tensors = {"state_dict": tensors, "step": 3}
    server.commit(REPO, {"sae.pt": saved(tensors)})
    sae = SAE.from_pretrained(REPO, "sae.pt", converter=loaders.prolu_checkpoint)
    assert type(sae) is ProLUSAE
    x = torch.randn(50, D_IN)
    acts = prolu((x - b_dec) @ W_enc, b_enc)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), acts @ W_dec + b_dec, rtol=1e-5, atol=1e-5)


class Malicious:
    """A pickle that would write a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_wants_code_is_refused(server: LocalHub, tmp_path: Path, how: str) -> None:
    target = tmp_path / "written"
    bad = {"W_enc": Malicious(target)}
    server.commit(REPO, {"sae.pt": saved(bad) if how == "torch" else pickle.dumps(bad)})
    with pytest.raises(ArtifactError, match=r"'sae.pt' is a pickle that asks for more.*refused"):
        loaders.prolu_checkpoint(REPO, "sae.pt")
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gate_bias": None}, "has no b_gate, known as gate_bias; it holds decoder.weight"),
        ({"r_mag": torch.zeros(3)}, r"r_mag is \(3,\), and should be \(24,\)"),
        ({"encoder.weight": torch.zeros(4, 4)}, r"W_enc is \(4, 4\), and should be \(8, 24\)"),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    server: LocalHub, change: dict[str, Any], sentence: str
) -> None:
    tensors = {k: v for k, v in {**gated_tensors(), **change}.items() if v is not None}
    server.commit(REPO, {"l3/ae.pt": saved(tensors), "l3/config.json": config()})
    with pytest.raises(ArtifactError, match=sentence):
        loaders.dictionary_learning_gated(REPO, "l3")


def test_other_files_are_sentences(server: LocalHub) -> None:
    server.commit(REPO, {"a/ae.pt": saved({}), "a/config.json": config(dict_class="AutoEncoder")})
    with pytest.raises(ArtifactError, match="is no GatedAutoEncoder's but one of 'AutoEncoder'"):
        loaders.dictionary_learning_gated(REPO, "a")
    with pytest.raises(ArtifactError, match=r"There is no file 'tester/theirs/none.pt'"):
        loaders.prolu_checkpoint(REPO, "none.pt")
    server.commit(REPO, {"x.pt": saved({"W_enc": torch.zeros(2, 3)}), "y.safetensors": b"junk"})
    with pytest.raises(ArtifactError, match=r"has no W_dec, known as W_dec or decoder.weight"):
        loaders.prolu_checkpoint(REPO, "x.pt")
    with pytest.raises(ArtifactError, match=r"'y.safetensors' cannot be read"):
        loaders.prolu_checkpoint(REPO, "y.safetensors")


# --- named releases -------------------------------------------------------------------------------


class Releases:
    """A stranger's plugin with a short name for a repository."""

    __name__ = "releases"

    def __init__(self, **releases: Any):
        self.releases = releases

    @hookimpl
    def register_loaders(self, register: Any) -> None:
        register("their_loader", loaders.dictionary_learning_gated, releases=self.releases)


@pytest.fixture
def clean_bridge() -> Iterator[None]:
    before = dict(get_pretrained_saes_directory())
    yield
    directory = get_pretrained_saes_directory()
    directory.clear()
    directory.update(before)
    NAMED_PRETRAINED_SAE_LOADERS.pop("their_loader", None)


def collected(**releases: Any) -> Registry:
    manager = Manager()
    manager.add(Releases(**releases), "stranger", "1.0")
    return collect(manager)


GOOD = {"repo_id": REPO, "model": "pythia-70m-deduped", "saes": {"layer-3": "l3"}}


@pytest.mark.usefixtures("clean_bridge")
def test_a_named_release_loads_by_its_short_name(server: LocalHub) -> None:
    server.commit(REPO, {"l3/ae.pt": saved(gated_tensors()), "l3/config.json": config()})
    found = collected(**{"their-saes": GOOD})
    assert [info.error for info in found.plugins] == [None]
    hand_over(found)
    sae = SAE.from_pretrained("their-saes", "layer-3")
    assert sae.cfg.d_sae == D_SAE
    with pytest.raises(ValueError, match="ID layer-4 not found in release their-saes"):
        SAE.from_pretrained("their-saes", "layer-4")


@pytest.mark.parametrize(
    ("releases", "sentence"),
    [
        ({"x": {"repo_id": "a/b"}}, "Release 'x' needs repo_id, model and saes"),
        ({"gpt2-small-res-jb": GOOD}, "'gpt2-small-res-jb' is already owned by sae-lens"),
    ],
)
def test_a_release_that_cannot_be_is_a_failed_plugin(releases: Any, sentence: str) -> None:
    (info,) = collected(**releases).plugins
    assert info.status == "failed"
    assert sentence in str(info.error)
