"""What every registered architecture promises, a stranger's included.

Collected from the live registry: install a plugin and this suite runs for its architectures too.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

import sae_gated_plugin

D_IN, D_SAE, N = 16, 48, 64

#: Options of all architectures with a training step of ours.
OF_ALL: list[dict[str, Any]] = [
    {},
    {"backend": "sparse"},
    {"target_l0": 8.0},
    {"dead_latents": "auxk", "auxk_coefficient": 0.1},
    {"decoder_coherence": 0.5, "decoder_coherence_cap": 0.2},
    {"matryoshka_widths": (8, 20, D_SAE), "backend": "sparse"},
]
OF_GATED: list[dict[str, Any]] = [
    *OF_ALL,
    {"aux_decoder": "trainable", "decoder": "norm_weighted"},
    {"learn_r_mag": False},
    {"tie_encoders": False},
    {"sparsity_loss": "sqrt_l1"},
    {"apply_b_dec_to_input": False},
    {"tie_b_mag": True},
]
OF_RELU = [*OF_ALL, {"decoder": "norm_weighted"}, {"sparsity_loss": "sqrt_l1"}]
#: Flags that make another computation of the same architecture.
FLAGS: dict[str, list[dict[str, Any]]] = {
    "gated": [*OF_GATED, {"aux_decoder": "trainable"}, {"decoder": "norm_weighted"}],
    # d_hidden as wide as the dictionary: shapes alone do not tell them apart
    "mlp_encoder": [*OF_GATED, {"residual": False}, {"d_hidden": D_SAE}],
    "prolu": [
        *OF_ALL,
        {"gradient": "relu"},
        {"hybrid": True},
        {"decoder": "norm_weighted"},
        {"sparsity_loss": "lp"},
        {"apply_b_dec_to_input": False},
    ],
    "relu": OF_RELU,
    "expanded": OF_RELU,
    "rescale_shift": [{}, {"backend": "sparse"}],
}
#: Parameters that a flag, or the architecture itself, keeps from learning.
FROZEN = {
    ("gated", "learn_r_mag"): {"r_mag"},
    ("gated", "tie_b_mag"): {"b_mag"},
    ("mlp_encoder", "learn_r_mag"): {"r_mag"},
    ("mlp_encoder", "tie_b_mag"): {"b_mag"},
    ("rescale_shift", None): {"W_enc", "W_dec", "b_dec", "b_gate"},
}
#: In tests of their own; `resample` only acts in a trainer.
ELSEWHERE = {
    "control",
    "resample_steps",
    "resample_share",
    "resample_warm_up_steps",
    "standard_sae",
}

ARCHITECTURES = sorted(
    name
    for name, architecture in sae_gated_plugin.registry().architectures.items()
    if architecture.training is not None
)
CASES = [(name, flags) for name in ARCHITECTURES for flags in FLAGS.get(name, [{}])]

pytestmark = pytest.mark.filterwarnings("ignore:decoder=.* mixes the two:UserWarning")


def case_id(case: Any) -> str:
    name, flags = case
    return "-".join([name, *(f"{key}={value}" for key, value in flags.items())])


each = pytest.mark.parametrize("case", CASES, ids=case_id)


@functools.cache
def standard_sae(d_sae: int) -> str:
    """Folder of a ReLU SAE for rescale_shift to mend."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    build(("relu", {}), d_sae=d_sae).save_inference_model(folder)
    return folder


def build(case: Any, randomize: bool = True, **options: Any) -> Any:
    name, flags = case
    if name == "rescale_shift":
        options["standard_sae"] = standard_sae(options.get("d_sae", D_SAE))
    sae_class, config_class = get_sae_training_class(name)
    torch.manual_seed(0)
    sae = sae_class(config_class(**{"d_in": D_IN, "d_sae": D_SAE, **flags, **options}))
    if randomize:  # as after training: no parameter is at a special value
        with torch.no_grad():
            for parameter_name, parameter in sae.named_parameters():
                if parameter.ndim == 1 and parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif parameter_name == "W_enc" or not parameter.any():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return sae


def data(n: int = N) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(3))


def coefficients(sae: Any) -> dict[str, float]:
    values = sae.get_coefficients()
    return {k: float(v if isinstance(v, float | int) else v[0]) for k, v in values.items()}


def step(sae: Any, x: Tensor) -> Any:
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    return sae.training_forward_pass(TrainStepInput(x, coefficients(sae), dead, 0, False))


@each
def test_shapes(case: Any) -> None:
    sae, x = build(case), data()
    output = step(sae, x)
    assert output.sae_out.shape == x.shape
    assert output.feature_acts.shape == (N, D_SAE)
    assert output.loss.shape == ()
    assert all(value.shape == () for value in output.losses.values())
    assert sae.encode(x).shape == (N, D_SAE)
    assert sae(x.view(4, 16, D_IN)).shape == (4, 16, D_IN)
    torch.testing.assert_close(sae(x), output.sae_out)
    torch.testing.assert_close(output.feature_acts.to_dense(), sae.encode(x))


@each
def test_the_axis_that_counts_latents_is_declared(case: Any) -> None:
    """For all parameters that have one, in training and inference."""
    if case[0] == "sae_lens_gated" or case[1].get("d_hidden") == D_SAE:
        pytest.skip("SAELens's own class, or one whose shapes do not tell")
    sae = build(case)
    if not hasattr(sae, "latent_axes"):
        pytest.skip("a third-party class, which declares none")
    inference_class = get_sae_class(sae.cfg.get_inference_config_class().architecture())[0]
    for latent_axes in (sae.latent_axes, getattr(inference_class, "latent_axes", sae.latent_axes)):
        for name, parameter in sae.named_parameters():
            axes = [axis for axis, size in enumerate(parameter.shape) if size == D_SAE]
            assert axes == ([latent_axes[name]] if name in latent_axes else []), name


@each
def test_construction_on_the_meta_device(case: Any) -> None:
    sae = build(case, randomize=False, device="meta")
    assert {p.device.type for p in sae.parameters()} == {"meta"}


@each
def test_config_round_trip(case: Any) -> None:
    cfg = build(case).cfg
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert type(again) is type(cfg)
    assert again.to_dict() == cfg.to_dict()
    details = cfg.metadata.training_architecture_details
    for key, value in case[1].items():
        assert details.get(key, getattr(cfg, key)) == value


@each
def test_saved_and_loaded_it_computes_the_same(case: Any, tmp_path: Path) -> None:
    sae, x = build(case), data()
    expected = sae.encode(x), sae(x)
    sae.save_inference_model(tmp_path / "inference")
    loaded = SAE.load_from_disk(tmp_path / "inference")
    saved_as = sae.cfg.get_inference_config_class().architecture()
    assert type(loaded) is get_sae_class(saved_as)[0]
    torch.testing.assert_close(loaded.encode(x), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded(x), expected[1], rtol=1e-5, atol=1e-5)

    sae.save_model(tmp_path / "checkpoint")
    trained = TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    assert trained.cfg.to_dict() == sae.cfg.to_dict()
    torch.testing.assert_close(trained(x), expected[1])
    resumed = build(case, randomize=False)
    resumed.load_weights_from_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(resumed(x), expected[1])


@each
def test_folding_leaves_reconstructions_unchanged(case: Any, tmp_path: Path) -> None:
    sae, x = build(case), data()
    expected, acts, norms = sae(x), sae.encode(x), sae.W_dec.norm(dim=1)
    sae.save_inference_model(tmp_path)
    for foldable in (sae, SAE.load_from_disk(tmp_path)):
        foldable.fold_W_dec_norm()
        torch.testing.assert_close(foldable(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(foldable.encode(x), acts * norms, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(foldable.W_dec.norm(dim=1), torch.ones(D_SAE))
    scaled = SAE.load_from_disk(tmp_path)
    scaled.fold_activation_norm_scaling_factor(0.25)
    torch.testing.assert_close(scaled(x / 0.25), expected / 0.25, rtol=1e-4, atol=1e-4)


@each
def test_the_intended_parameters_receive_gradient(case: Any) -> None:
    sae = build(case)
    frozen = set().union(*(FROZEN.get((case[0], flag), set()) for flag in (None, *case[1])))
    step(sae, data()).loss.backward()
    for name, parameter in sae.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
            assert parameter.grad.isfinite().all(), name


@each
def test_coefficients_keep_their_meaning_when_the_batch_doubles(case: Any) -> None:
    sae, x = build(case).eval(), data()  # a controller of lambda learns from every training step
    once, twice = step(sae, x), step(sae, torch.cat([x, x]))
    for name in once.losses:
        torch.testing.assert_close(twice.losses[name], once.losses[name], rtol=1e-4, atol=1e-6)


def planted(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """16 orthonormal features, each present in 8 % of tokens at strengths 2 to 4."""
    features = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(9)))[
        0
    ]
    present = torch.rand(n, D_IN, generator=generator) < 0.08
    strength = 2 + 2 * torch.rand(n, D_IN, generator=generator)
    return (present * strength) @ features, features


def planted_lambda(case: Any) -> dict[str, Any]:
    """lambda acts on different things: on gate activations, on norm-weighted ones, on codes."""
    name, flags = case
    free_norms = flags.get("decoder") == "norm_weighted"
    values = {
        "gated": 1.0 if free_norms else 4.0,
        "mlp_encoder": 1.0 if free_norms else 4.0,
        "expanded": 1.0 if free_norms else 2.0,
        "sae_lens_gated": 1.0,
        "relu": 1.0,
        "prolu": 0.5,
    }
    chosen: dict[str, Any] = {"l1_coefficient": values[name]} if name in values else {}
    if "target_l0" in flags:
        chosen["target_l0"] = 1.6  # 16 features at 8 % are 1.3 a token
    if "matryoshka_widths" in flags:
        chosen["matryoshka_widths"] = (8, 16, 2 * D_IN)
    return chosen


@each
def test_training_finds_planted_features(case: Any) -> None:
    """SAELens's own trainer; the loss falls and most features have a decoder row of their own."""
    if case[0] == "rescale_shift":
        pytest.skip("it learns no decoder; see test_rescale_shift.py")
    generator = torch.Generator().manual_seed(1)
    sae = build(case, randomize=False, d_sae=2 * D_IN, **planted_lambda(case))
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=512,
            lr=1e-2,
            lr_end=1e-2,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )
    losses = [trainer.step(planted(512, generator)[0]).loss.item() for _ in range(250)]
    assert losses[-1] < 0.5 * losses[0]
    features = planted(1, generator)[1]
    cosines = torch.nn.functional.cosine_similarity(
        features[:, None], sae.W_dec.detach()[None], dim=-1
    )
    found = (cosines.max(dim=1).values > 0.9).float().mean()
    assert found >= 0.8, f"{found:.0%} of the planted features found"


def test_every_flag_of_ours_is_covered() -> None:
    """A new config field with choices must get a row above."""
    import dataclasses

    for name, rows in FLAGS.items():
        inherited = {f.name for f in dataclasses.fields(TrainingSAEConfig)}
        own = {f.name for f in dataclasses.fields(get_sae_training_class(name)[1])} - inherited
        covered = {key for row in rows for key in row}
        assert own - covered <= {"l1_coefficient", "l1_warm_up_steps"} | ELSEWHERE


def test_no_warning_of_ours_on_the_default_path() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in FLAGS:
            step(build((name, {})), data())
