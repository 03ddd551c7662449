"""Results as a measurement writes them."""

from __future__ import annotations

from typing import Any

LONG = "a label that explains itself at very great length " * 3 + "x" * 120
AWKWARD = ['<b>&"bold"</b>', "_hidden", "$x$ costs $2", "γ → 漢字 🎉", LONG]


def result(label: str = "gated", seed: int | None = 0, l0: float = 30.0, **changes: Any) -> dict:
    density = {"edges": [-4.0, -3.0, -2.0, -1.0], "counts": [5, 20, 7]}
    return {
        "architecture": "gated",
        "label": label,
        "seed": seed,
        "d_in": 576,
        "d_sae": 4608,
        "model_name": "a/model",
        "hook_name": "model.layers.6",
        "dataset": "a/text",
        "split": "validation",
        "tokens": 48_768,
        "training_tokens": 2_097_152,
        "l0": l0,
        "fvu": 2.1 / l0,
        "gamma": 0.9912345,
        "gamma_ci": [0.9901234, 0.9923456],
        "gamma_centered": 0.9923456,
        "loss_recovered": 1 - 0.5 / (l0 + 10),
        "nats_lost": 0.0590693,
        "kl": 0.2028722,
        "dead_share": 0.0123456,
        "l1_coefficient": 240 / l0,
        "target_l0": None,
        "settings": {"l1_coefficient": round(240 / l0)},
        "undefined": {},
        "histograms": {"log10_latent_density": density, "mystery": density},
        "path": "runs/x",
        "seconds": 3.0,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        **changes,
    }


def grid(labels: list[str], points: int, seeds: int, **changes: Any) -> list[dict]:
    return [
        result(label, seed, 15 * 1.7**i * (1 + 0.1 * k + 0.02 * seed), settings={"λ": i}, **changes)
        for k, label in enumerate(labels)
        for i in range(points)
        for seed in range(seeds)
    ]
