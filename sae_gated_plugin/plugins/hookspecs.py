"""What a plugin may offer. Write `@hookimpl` functions of these names and name their module in the
entry-point group `sae_lens`; the built-in architectures, losses and metrics do the same.
"""

from __future__ import annotations

from typing import Any

import pluggy

PROJECT = "sae_lens"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_architectures(register: Any) -> None:
    """Call `register(name, training=(SAE, config), inference=(SAE, config))` for each architecture.

    The classes subclass SAELens's TrainingSAE, TrainingSAEConfig, SAE and SAEConfig; either pair
    may be left out. `replaces="sae_lens"` declares the one sanctioned override, our own `gated`.
    """


@hookspec
def register_losses(register: Any) -> None:
    """Call `register(name, function)` for each sparsity loss.

    function(acts, decoder_norms, n_tokens) returns a 0-d tensor; see losses.py.
    """


@hookspec
def register_metrics(register: Any) -> None:
    """Call `register(name, factory)` for each metric.

    factory() returns a streaming metric with update(batch) and compute(); see metrics.py.
    """


@hookspec
def register_loaders(register: Any) -> None:
    """Call `register(name, function, releases={...})` for each loader of foreign weights.

    function has the signature of SAELens's `PretrainedSaeHuggingfaceLoader`, and SAELens then knows
    it under that name. releases: short name → {"repo_id": ..., "model": ..., "saes": {sae_id: path
    in the repository}}, so that `SAE.from_pretrained("short name", sae_id)` finds them; may be left
    out. For weights in SAELens's own format the loader is `sae_lens_huggingface_loader`.
    """
