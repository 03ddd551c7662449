from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from support.models import linear_sae, transformer
from support.runs import D_IN, HOOK_NAME, QUICKSTART
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.measure.activations import hook_point_of
from sae_gated_plugin.measure.options import EvalOptions
from sae_gated_plugin.model.hook_point import HookPoint, bridge_name
from sae_gated_plugin.model.replay import Passes

MODEL = str(QUICKSTART / "model")


@pytest.fixture(scope="module")
def attention_model() -> HookedTransformer:
    return transformer(n_heads=3, d_model=12, d_vocab=20)


def test_reads_what_saelens_trains_on(hook_point: HookPoint) -> None:
    tokens = torch.arange(40).reshape(2, 20)
    logits, acts = hook_point.run(tokens)
    expected, cache = hook_point.model.run_with_cache(tokens, names_filter=[HOOK_NAME])
    assert torch.equal(acts, cache[HOOK_NAME])
    assert torch.equal(logits, expected)
    assert hook_point.sizes() == (D_IN, logits.shape[-1])


def test_the_model_goes_on_with_what_replaces_them(hook_point: HookPoint) -> None:
    tokens = torch.arange(40).reshape(2, 20)
    clean, acts = hook_point.run(tokens)
    assert torch.equal(hook_point.run(tokens, lambda x: x.clone())[0], clean)

    def from_position_7(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 7:] = 0
        return x

    changed, found = hook_point.run(tokens, from_position_7)
    assert torch.equal(found, acts)  # as they were before
    assert torch.equal(changed[:, :7], clean[:, :7])
    assert not torch.isclose(changed[:, 7:], clean[:, 7:]).all(-1).any()


def test_one_head_of_many(attention_model: HookedTransformer) -> None:
    tokens = torch.arange(10).unsqueeze(0)
    name = "blocks.0.attn.hook_z"
    every, one = HookPoint(attention_model, name), HookPoint(attention_model, name, 1)
    assert (every.sizes(), one.sizes()) == ((12, 20), (4, 20))
    z = every.run(tokens)[1].unflatten(-1, (3, 4))
    assert torch.equal(one.run(tokens)[1], z[:, :, 1])
    z[:, :, 1] = 5.0
    expected = every.run(tokens, lambda _: z.flatten(2))[0]
    assert torch.equal(one.run(tokens, lambda x: torch.full_like(x, 5.0))[0], expected)


@pytest.mark.parametrize("kind", ["transformers", "transformer_lens"])
def test_blocks_before_the_hook_point_run_once(hook_point: HookPoint, kind: str) -> None:
    if kind == "transformer_lens":
        model = transformer(n_layers=3, n_ctx=40, d_vocab=99)
        hook_point = HookPoint(model, "blocks.2.hook_resid_mid")
    blocks = hook_point.blocks_before()
    assert len(blocks) == 2
    calls: list[int] = []
    inside = blocks[1].mlp  # the block's own hooks run when it is replayed, too
    handle = inside.register_forward_pre_hook(lambda *_: calls.append(1))
    passes = Passes(hook_point)
    for tokens in (torch.arange(40).reshape(2, 20), torch.arange(30).reshape(1, 30) + 40):
        calls.clear()
        logits, acts = passes.first(tokens)
        changed = passes.again(tokens, lambda x: x * 0.5)
        assert len(calls) == 1
        expected, found = hook_point.run(tokens, lambda x: x * 0.5)
        assert torch.equal(changed, expected)
        assert torch.equal(acts, found)
        assert torch.equal(logits, hook_point.run(tokens)[0])
    handle.remove()


@pytest.mark.parametrize("without", [lambda aside: len(aside), lambda aside: aside[0]])
def test_blocks_are_not_left_out_where_they_do_more_than_they_return(
    without: Callable[[list[int]], int],
) -> None:
    """Without it the last block gives other logits, or raises."""
    model = transformer(n_layers=3, n_ctx=40)
    first, last = model.blocks[0], model.blocks[2]
    aside: list[int] = []
    read, write = first.forward, last.forward
    first.forward = lambda *args, **kwargs: aside.append(1) or read(*args, **kwargs)
    last.forward = lambda *args, **kwargs: write(*args, **kwargs).roll(without(aside), -1)
    last.register_forward_hook(lambda *_: aside.clear())
    point = HookPoint(model, "blocks.1.hook_resid_post")
    passes, tokens = Passes(point), torch.arange(40).reshape(2, 20)
    passes.first(tokens)
    expected = point.run(tokens, lambda x: x * 0.5)[0]
    assert torch.equal(passes.again(tokens, lambda x: x * 0.5), expected)
    assert not torch.equal(expected, point.run(tokens)[0])


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_resid_pre"])
def test_hook_points_with_no_block_before(attention_model: HookedTransformer, name: str) -> None:
    assert HookPoint(attention_model, name).blocks_before() == []


def test_hook_points_that_are_not_there(
    hook_point: HookPoint, attention_model: HookedTransformer
) -> None:
    sentence = r"no hook point 'model\.layer\.2'; the nearest are 'model\.layers\."
    with pytest.raises(ConfigError, match=sentence):
        HookPoint.load(MODEL, "AutoModelForCausalLM", "model.layer.2")
    for name, near in (
        ("blocks.2.hook_resid_post", r"'model\.layers\.2', 'model\.layers\.2\."),
        ("blocks.9.hook_resid_post", r"'model\.layers\.3', 'model\.layers\.3\."),
        ("model.layers.1.mpl", r"'model\.layers\.1\.mlp', "),
    ):
        with pytest.raises(ConfigError, match=f"the nearest are {near}"):
            HookPoint.load(MODEL, "AutoModelForCausalLM", name)
    with pytest.raises(ConfigError, match="no hook point 'x'"):
        HookPoint(hook_point.model, "x").require_exists("tiny")
    with pytest.raises(ConfigError, match=r"hook_head_index is 1, but .* has 0 heads"):
        HookPoint(hook_point.model, HOOK_NAME, 1).sizes()
    with pytest.raises(ConfigError, match=r"hook_head_index is 3, but .* has 3 heads"):
        HookPoint(attention_model, "blocks.0.attn.hook_z", 3).sizes()
    with pytest.raises(ConfigError, match="gives no activations in a forward pass"):
        HookPoint(attention_model, "blocks.0.hook_attn_in").sizes()


def test_width(hook_point: HookPoint) -> None:
    hook_point.require_width(D_IN)
    with pytest.raises(ConfigError, match=f"is {D_IN} wide; set sae.d_in={D_IN} or"):
        hook_point.require_width(64)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_a_model_without_a_tokenizer(copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"(: \(1\)|model_proto) .* SAELens needs the model"):
        HookPoint.load(str(copied), "AutoModelForCausalLM", HOOK_NAME)


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"context_size": 128, "prepend_bos": False}, None),
        ({"context_size": 129}, r"context_size is 129, but the model has 128 positions"),
        ({"prepend_bos": True}, r"prepend_bos is true, but .* has no BOS token"),
    ],
)
def test_sequences_that_the_model_was_not_made_for_are_warned_of(
    copied: Path,
    small_run: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    warning: str | None,
) -> None:
    file = copied / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in tokenizer.items() if k != "bos_token"}))
    config = load_config({**small_run, "model_name": str(copied), **options})
    HookPoint.for_training(config.runner)
    trained = caplog.text
    assert bool(re.search(warning or "context_size|BOS", trained)) == bool(warning)
    caplog.clear()
    sae = linear_sae(torch.eye(D_IN), **{"model_name": str(copied), **options})
    sae.cfg.metadata.model_class_name = "AutoModelForCausalLM"
    hook_point_of(sae, EvalOptions())
    assert caplog.text == trained


def test_positions_of_a_model_of_transformer_lens(caplog: pytest.LogCaptureFixture) -> None:
    point = HookPoint(transformer(n_ctx=16), "blocks.0.hook_resid_pre")
    point.warn_of_text(16, True)  # it has no tokenizer that could lack a BOS token
    assert not caplog.text
    point.warn_of_text(17, True)
    assert "the model has 16 positions" in caplog.text


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda", "cuda:99", "mps"])
def test_devices_that_are_not_there(device: str, small_run: dict[str, Any]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    sentence = rf"Device '{device}' cannot be used here: .* There is cpu"
    with pytest.raises(ConfigError, match=sentence):
        EvalOptions(device=device)
    if device != "gpu":  # which no configuration may say
        for name in ("device", "llm_device", "act_store_device"):
            config = load_config({**small_run, name: device})
            with pytest.raises(ConfigError, match=f"^'{name}': {sentence}"):
                HookPoint.for_training(config.runner)


@pytest.mark.parametrize(
    ("name", "class_name", "sentence"),
    [
        ("./none", "AutoModelForCausalLM", "model_name './none' does not exist"),
        ("nobody/none", "AutoModelForCausalLM", "Model 'nobody/none' .* cannot be loaded: OSErr"),
        (MODEL, "Auto", "cannot be loaded: ValueError: Unknown model class: Auto"),
        (MODEL, "HookedTransformer", "cannot be loaded"),
    ],
)
def test_models_that_cannot_be_loaded(name: str, class_name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        HookPoint.load(name, class_name, HOOK_NAME)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(
    getattr(sae_lens, "SAETransformerBridge", None) is None,
    reason="SAETransformerBridge came with TransformerLens 3",
)
def test_the_bridge_finds_the_same_place_by_its_own_name() -> None:
    bridge = sae_lens.SAETransformerBridge.boot_transformers(str(QUICKSTART / "model"))
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    tokens = bridge.to_tokens("It was a bright cold day in April.")
    _, cache = bridge.run_with_cache(tokens)
    for name in ("model.layers.2", "model.layers.0.mlp", "model.layers.1.self_attn"):
        seen: list[Any] = []
        hook = model.get_submodule(name).register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(output)
        )
        model(tokens)
        hook.remove()
        expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        found = cache[str(bridge_name(name))]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert bridge_name("model.layers.2.mlp.gate_proj") is None
    assert bridge_name("transformer.h.11") == "blocks.11.hook_out"
    assert bridge_name("blocks.3.hook_resid_post") == "blocks.3.hook_resid_post"
