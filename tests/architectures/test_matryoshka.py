"""Matryoshka losses against each prefix's own loss, written out here densely in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from support.runs import SMALL_RUN
from torch import Tensor

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ConfigError

D_IN, D_SAE, N = 11, 37, 29
WIDTHS = (5, 16, D_SAE)
FORMS = ("dense", "sparse")

#: Every architecture with the option, and what changes how its losses are computed.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gated", {}),
    ("gated", {"aux_decoder": "trainable", "decoder": "norm_weighted"}),
    ("gated", {"aux_decoder": "trainable"}),
    ("gated", {"normalize_activations": "layer_norm"}),
    ("gated", {"normalize_activations": "constant_norm_rescale"}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("gated", {"sparsity_loss": "sqrt_l1"}),
    ("prolu", {"gradient": "relu"}),
    ("prolu", {"gradient": "ste"}),
    ("relu", {"decoder": "norm_weighted"}),
    ("relu", {"sparsity_loss": "lp_0.7"}),
    ("expanded", {}),
]
each = pytest.mark.parametrize("case", CASES, ids=str)


def build(case: tuple[str, dict[str, Any]], **options: Any) -> Any:
    name, flags = case
    sae_class, config_class = get_sae_training_class(name)
    shape = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64"}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mixed forms are wanted here
        cfg = config_class(**{**shape, "matryoshka_widths": WIDTHS, **flags, **options})
    sae = sae_class(cfg)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name == "W_dec" and cfg.decoder == "norm_weighted":
                parameter.mul_(torch.rand(D_SAE, 1) + 0.5)
    return sae


def data(n: int = N) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def step(sae: Any, x: Tensor, l1: float = 0.7, dead: Tensor | None = None) -> TrainStepOutput:
    return sae.training_forward_pass(TrainStepInput(x, {"l1": l1}, dead, 5, False))


# --- the reference --------------------------------------------------------------------------------


def codes(name: str, flags: dict[str, Any], p: dict[str, Tensor], m: Tensor) -> tuple[Tensor, ...]:
    """f, and the code of the auxiliary reconstruction where there is one, both (N, d_sae)."""
    if name == "gated":
        g = m + p["b_gate"]
        return (g > 0) * (p["r_mag"].exp() * m + p["b_mag"]).relu(), g.relu()
    if name == "prolu":
        on = ((m > 0) & (m + p["b_enc"] > 0)).detach()
        if flags["gradient"] == "relu":  # f = m, and df/db = df/dm = 1
            return (on * (m + p["b_enc"] - p["b_enc"].detach()),)
        return (on * (m + m.detach() * (m - m.detach() + p["b_enc"] - p["b_enc"].detach())),)
    f = (m + p["b_enc"]).relu()
    return (f * p["log_t"].exp(), f) if name == "expanded" else (f,)


def reference(
    case: tuple[str, dict[str, Any]], sae: Any, x: Tensor, l1: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each prefix's own loss, its terms summed over prefixes; gradients of all parameters."""
    name, flags = case
    p = {n: v.detach().clone().requires_grad_() for n, v in sae.named_parameters()}
    normalization = flags.get("normalize_activations")
    shift, scale = torch.zeros(N, 1, dtype=x.dtype), torch.ones(N, 1, dtype=x.dtype)
    inside = x
    if normalization == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = (x - shift).std(-1, keepdim=True)
        inside = (x - shift) / (scale + 1e-5)
    elif normalization == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / D_IN**0.5
        inside = x / scale
    centred = inside - p["b_dec"] if flags.get("apply_b_dec_to_input", True) else inside
    f, *auxiliary = codes(name, flags, p, centred @ p["W_enc"])
    penalised = auxiliary[0] if auxiliary else f
    unit_norm = flags.get("decoder", "unit_norm") == "unit_norm"
    if not unit_norm:
        penalised = penalised * p["W_dec"].norm(dim=1)
    power = {"sqrt_l1": 0.5, "lp_0.7": 0.7}.get(flags.get("sparsity_loss", "l1"), 1.0)
    frozen = flags.get("aux_decoder", "frozen") == "frozen"

    def error(code: Tensor, width: int, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        x_hat = (code[:, :width] @ W_dec[:width] + b_dec) * scale + shift
        return (x_hat - x).square().sum() / N

    terms: dict[str, Tensor] = {}
    l1_loss = torch.zeros((), dtype=x.dtype)
    for width in WIDTHS:
        inner = "" if width == D_SAE else "inner_"
        suffix = "" if width == D_SAE else f"_{width}"
        terms[f"{inner}mse_loss{suffix}"] = error(f, width, p["W_dec"], p["b_dec"])
        if auxiliary:
            W_dec, b_dec = (p[n].detach() if frozen else p[n] for n in ("W_dec", "b_dec"))
            terms[f"{inner}auxiliary_reconstruction_loss{suffix}"] = error(
                auxiliary[0], width, W_dec, b_dec
            )
        prefix = penalised[:, :width]
        l1_loss = l1_loss + l1 * (prefix[prefix > 0] ** power).sum() / N
    terms["l1_loss"] = l1_loss
    grads = dict(zip(p, torch.autograd.grad(sum(terms.values()), list(p.values()))))
    if unit_norm:
        rows = p["W_dec"].detach()
        grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * rows).sum(1, keepdim=True) * rows
    return terms, grads


@pytest.mark.parametrize("backend", FORMS)
@each
def test_loss_and_gradients_are_those_of_every_prefix(case: Any, backend: str) -> None:
    sae, x = build(case, backend=backend), data()
    terms, grads = reference(case, sae, x, 0.7)
    output = step(sae, x)
    assert set(output.losses) == set(terms)
    for name, expected in terms.items():
        assert output.losses[name].item() == pytest.approx(expected.item(), rel=1e-10), name
    assert output.loss.item() == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-10)
    output.loss.backward()
    for name, expected in grads.items():
        found = getattr(sae, name).grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", FORMS)
def test_no_auxiliary_term_moves_the_decoder(backend: str) -> None:
    """Nor the magnitude; b_dec keeps the gradient that goes through the encoder's input."""
    sae, x = build(("gated", {}), backend=backend), data()
    auxiliary = {k: v for k, v in step(sae, x).losses.items() if "auxiliary" in k}
    assert len(auxiliary) == len(WIDTHS)
    names = ("W_dec", "r_mag", "b_mag", "b_dec", "W_enc", "b_gate")
    for key, term in auxiliary.items():
        width = int(key.rsplit("_", 1)[1]) if key.startswith("inner") else D_SAE
        found = torch.autograd.grad(
            term, [getattr(sae, n) for n in names], allow_unused=True, retain_graph=True
        )
        grads = dict(zip(names, found))
        for name in names[:3]:
            assert grads[name] is None or not grads[name].any(), (key, name)
        b_dec = sae.b_dec.detach().clone().requires_grad_()
        g = ((x - b_dec) @ sae.W_enc.detach() + sae.b_gate.detach()).relu()
        fixed = g[:, :width] @ sae.W_dec.detach()[:width] + sae.b_dec.detach()
        expected = torch.autograd.grad((fixed - x).square().sum() / N, b_dec)[0]
        torch.testing.assert_close(grads["b_dec"], expected, rtol=1e-10, atol=1e-12)
        # Latents outside the prefix learn nothing from it, those inside do.
        for name, axis in (("W_enc", 0), ("b_gate", 0)):
            moved = grads[name].abs().reshape(-1, D_SAE).sum(axis)
            assert not moved[width:].any(), (key, name)
            assert moved[:width].any(), (key, name)


@pytest.mark.parametrize("backend", FORMS)
def test_latents_outside_every_inner_prefix_see_one_loss(backend: str) -> None:
    """The slice beyond the last inner width is penalised once, the first one three times."""
    sae, x = build(("relu", {}), backend=backend), data()
    grad = torch.autograd.grad(step(sae, x, l1=1.0).losses["l1_loss"], sae.b_enc)[0]
    acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) > 0
    prefixes = torch.tensor([sum(latent < width for width in WIDTHS) for latent in range(D_SAE)])
    assert set(prefixes.tolist()) == {1, 2, 3}
    torch.testing.assert_close(grad, acts.sum(0) * prefixes / N, check_dtype=False)


# --- what it is saved as --------------------------------------------------------------------------


def test_saved_it_is_plain_gated(tmp_path: Path) -> None:
    """SAELens's own class reads the file, computes the same; the widths are in its metadata."""
    sae, x = build(("gated", {}), dtype="float32"), data().float()
    expected = sae.encode(x), sae(x)
    sae.save_inference_model(tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "gated"
    assert loaded.cfg.metadata.training_architecture_details["matryoshka_widths"] == list(WIDTHS)
    plain = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=D_IN, d_sae=D_SAE))
    plain.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(plain.encode(x), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain(x), expected[1], rtol=1e-5, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


def config(**options: Any) -> Any:
    return get_sae_training_class("gated")[1](d_in=D_IN, d_sae=D_SAE, **options)


def test_d_sae_is_appended_as_in_saelens() -> None:
    given = [5, 16]
    assert config(matryoshka_widths=given).matryoshka_widths == WIDTHS
    assert given == [5, 16]
    assert config(matryoshka_widths=[5, 16, D_SAE]).matryoshka_widths == WIDTHS
    assert config().matryoshka_widths == ()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"matryoshka_widths": [16, 5]}, r"\[16, 5, 37\].* strictly increasing"),
        ({"matryoshka_widths": [5, 5]}, r"\[5, 5, 37\].* strictly increasing"),
        ({"matryoshka_widths": [0, 5]}, "above 0"),
        ({"matryoshka_widths": [5, 64]}, "64.* d_sae = 37"),
        ({"matryoshka_widths": [D_SAE]}, "one prefix.* leave"),
        ({"matryoshka_widths": [5, 16], "target_l0": 6.0}, "target_l0 is 6.* narrowest prefix.* 5"),
    ],
)
def test_bad_widths_get_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(**options)


@pytest.mark.parametrize("widths", ["abc", "5", "[a, b]", "[5.5, 64]", "[true, 64]", "[[5, 16]]"])
def test_widths_that_are_no_list_of_whole_numbers(widths: str) -> None:
    """In a run's file or an override; a sweep's list of lists is one of alternatives."""
    with pytest.raises(ConfigError, match=r"matryoshka_widths.* must be a list of whole numbers"):
        load_config(SMALL_RUN, [f"sae.matryoshka_widths={widths}"])
