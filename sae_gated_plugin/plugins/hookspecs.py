"""What a plugin may offer. Write `@hookimpl` functions of these names and name their module in the
entry-point group `sae_lens`; the built-in architectures, losses and metrics do the same.

The parameters of each `register` are those of the method of that name in `host.Registrar`.
"""

from __future__ import annotations

from typing import Any

import pluggy

PROJECT = "sae_lens"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_architectures(register: Any) -> None:
    """Call `register(name, training=(SAE, config), inference=(SAE, config))` for each one."""


@hookspec
def register_losses(register: Any) -> None:
    """Call `register(name, function)` for each sparsity loss."""


@hookspec
def register_metrics(register: Any) -> None:
    """Call `register(name, factory, title=..., format=".2%", direction="up")` for each metric."""


@hookspec
def register_loaders(register: Any) -> None:
    """Call `register(name, function, releases={...})` for each loader of foreign weights."""
