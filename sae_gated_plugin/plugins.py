"""Discovery, isolation, listing, and the bridge into SAELens's registries.

A plugin is a module with `@hookimpl` functions, named in the entry-point group `sae_lens`. One that
does not load or registers something unusable is skipped with a warning and listed as failed; what
it had registered until then is dropped. It never breaks `import sae_lens`.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from typing import Any, cast

import pluggy
import sae_lens.registry
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

from . import hookspecs
from .errors import PluginError, UnknownArchitecture, unknown_name

GROUP = hookspecs.PROJECT
OURS = "sae-gated-plugin"
HOST = "sae-lens"

logger = logging.getLogger("sae_gated_plugin")


@dataclass
class PluginInfo:
    """A plugin, as `sae-gated plugins` lists it. status: "ok" or "failed"; error says why."""

    distribution: str
    version: str
    module: str
    hooks: list[str] = field(default_factory=list[str])
    status: str = "ok"
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Architecture:
    """What was registered under one architecture's name; either pair may be missing."""

    training: tuple[type[Any], type[Any]] | None
    inference: tuple[type[Any], type[Any]] | None


@dataclass
class Registry:
    """Everything that plugins registered, by name, and the plugins themselves."""

    architectures: dict[str, Architecture] = field(default_factory=dict[str, Architecture])
    losses: dict[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])
    metrics: dict[str, Callable[[], Any]] = field(default_factory=dict[str, Callable[[], Any]])
    loaders: dict[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])
    plugins: list[PluginInfo] = field(default_factory=list[PluginInfo])


class Manager(pluggy.PluginManager):
    """pluggy's manager, with one record per plugin."""

    def __init__(self) -> None:
        super().__init__(GROUP)
        self.add_hookspecs(hookspecs)
        self.infos: list[tuple[Any, PluginInfo]] = []

    def add(self, plugin: Any, distribution: str, version: str = "") -> PluginInfo:
        """Register a module or object. Raises PluginError for hooks that do not exist."""
        name = getattr(plugin, "__name__", type(plugin).__name__)
        try:
            self.register(plugin, name)
            self.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self.is_registered(plugin):
                self.unregister(plugin)
            raise PluginError(
                f"Plugin '{name}' of {distribution}: {error}; "
                f"hooks are {', '.join(sorted(vars(self.hook)))}."
            ) from error
        hooks = sorted(caller.name for caller in self.get_hookcallers(plugin) or [])
        info = PluginInfo(distribution, version, name, hooks)
        self.infos.append((plugin, info))
        return info


def make_manager(load_entry_points: bool = True) -> Manager:
    """A fresh manager, by default with every installed plugin that can be imported."""
    manager = Manager()
    seen: set[str] = set()
    for entry_point in entry_points(group=GROUP) if load_entry_points else ():
        if entry_point.value in seen:  # two installs of one distribution on sys.path
            continue
        seen.add(entry_point.value)
        dist = entry_point.dist
        owner = (dist.name, dist.version) if dist else ("an unknown distribution", "")
        try:
            manager.add(entry_point.load(), *owner)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            info = PluginInfo(*owner, entry_point.value, status="failed", error=reason)
            manager.infos.append((None, info))
    return manager


def collect(manager: Manager, strict: bool = False) -> Registry:
    """Call every plugin's hooks. strict: raise the first PluginError instead of warning."""
    result = Registry(plugins=[info for _, info in manager.infos])
    owners: dict[tuple[str, str], str] = {}
    for plugin, info in manager.infos:
        if info.status == "ok":
            collected = Registry()
            try:
                for hook in info.hooks:
                    others = [p for p in manager.get_plugins() if p is not plugin]
                    call = manager.subset_hook_caller(hook, others)
                    call(register=_registrar(hook, info, collected, owners))
            except Exception as error:
                if strict:
                    raise
                info.status, info.error = "failed", f"{type(error).__name__}: {error}"
                owners = {k: v for k, v in owners.items() if v != _owner_id(info)}
            else:
                for kind in ("architectures", "losses", "metrics", "loaders"):
                    getattr(result, kind).update(getattr(collected, kind))
        if info.status == "failed":
            warnings.warn(
                f"Plugin '{info.module}' of {info.distribution} {info.version} was skipped: "
                f"{info.error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return result


def _owner_id(info: PluginInfo) -> str:
    return f"{info.distribution} ({info.module})"


def _registrar(
    hook: str, info: PluginInfo, collected: Registry, owners: dict[tuple[str, str], str]
) -> Callable[..., None]:
    kind = hook.removeprefix("register_")

    def claim(name: str, replaces: str | None = None) -> None:
        owner = owners.get((kind, name)) or _host_owner(kind, name)
        sanctioned = (kind, name, replaces, info.distribution) == (
            "architectures",
            "gated",
            "sae_lens",
            OURS,
        )
        if owner and not (sanctioned and owner == HOST):
            raise PluginError(
                f"{kind[:-1].capitalize()} '{name}' of {_owner_id(info)} is already owned by "
                f"{owner}; choose another name."
            )
        owners[kind, name] = _owner_id(info)

    def register_architecture(
        name: str,
        *,
        training: tuple[type[Any], type[Any]] | None = None,
        inference: tuple[type[Any], type[Any]] | None = None,
        replaces: str | None = None,
    ) -> None:
        if training is None and inference is None:
            raise PluginError(f"Architecture '{name}' has neither training nor inference classes.")
        _require_classes(name, "training", training, (TrainingSAE, TrainingSAEConfig))
        _require_classes(name, "inference", inference, (SAE, SAEConfig))
        claim(name, replaces)
        collected.architectures[name] = Architecture(training, inference)

    def register_callable(name: str, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise PluginError(f"{kind[:-1].capitalize()} '{name}' is not callable: {function!r}.")
        claim(name)
        getattr(collected, kind)[name] = function

    return register_architecture if kind == "architectures" else register_callable


def _require_classes(
    name: str, role: str, pair: tuple[type[Any], type[Any]] | None, bases: tuple[type[Any], ...]
) -> None:
    if pair is None:
        return
    given: Any = pair  # whatever a stranger passed
    fits = isinstance(given, tuple) and len(cast("tuple[Any, ...]", given)) == len(bases)
    if not fits or not all(
        isinstance(got, type) and issubclass(got, base) for got, base in zip(given, bases)
    ):
        wanted = ", ".join(f"a subclass of {base.__name__}" for base in bases)
        raise PluginError(f"Architecture '{name}': {role} must be ({wanted}); got {pair!r}.")


def _host_owner(kind: str, name: str) -> str | None:
    """Who holds the name in SAELens itself: SAELens, or whoever called its register functions."""
    if kind == "loaders":
        return HOST if name in NAMED_PRETRAINED_SAE_LOADERS else None
    if kind != "architectures":
        return None
    pair = SAE_TRAINING_CLASS_REGISTRY.get(name) or SAE_CLASS_REGISTRY.get(name)
    if pair is None or pair[0].__module__.startswith("sae_gated_plugin."):
        return None
    return HOST if pair[0].__module__.startswith("sae_lens.") else f"module {pair[0].__module__}"


# --- the bridge -----------------------------------------------------------------------------------

_lock = threading.RLock()
_active: Registry | None = None


def activate() -> Registry:
    """Load every plugin and hand its architectures and loaders to SAELens; once per process."""
    global _active
    with _lock:
        if _active is None:
            _active = collect(make_manager())
            _bridge(_active)
        return _active


def registry() -> Registry:
    """What is active in this process."""
    return activate()


def _bridge(active: Registry) -> None:
    for name, architecture in active.architectures.items():
        # Inference first: a training config looks its inference class up while it is built.
        # `register_sae_class` would refuse the name `gated`.
        if architecture.inference is not None:
            SAE_CLASS_REGISTRY[name] = architecture.inference
        if architecture.training is not None:
            SAE_TRAINING_CLASS_REGISTRY[name] = architecture.training
    NAMED_PRETRAINED_SAE_LOADERS.update(active.loaders)
    if "gated" in active.architectures:
        logger.info("`gated` is now the Gated SAE of %s.", OURS)
    _explain_unknown_architectures()


def _explain_unknown_architectures() -> None:
    """Give SAELens's two lookups a sentence instead of a bare KeyError.

    They are imported by name into several of its modules, so each binding is replaced.
    """
    for function_name, known in (
        ("get_sae_class", SAE_CLASS_REGISTRY),
        ("get_sae_training_class", SAE_TRAINING_CLASS_REGISTRY),
    ):
        original = getattr(sae_lens.registry, function_name)
        explaining = _explaining(original, known)
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == "sae_lens" and (
                vars(module).get(function_name) is original
            ):
                setattr(module, function_name, explaining)


def _explaining(lookup: Callable[[str], Any], known: dict[str, Any]) -> Callable[[str], Any]:
    @functools.wraps(lookup)
    def explain(architecture: str) -> Any:
        if architecture not in known:
            raise UnknownArchitecture(unknown_name("architecture", architecture, known))
        return lookup(architecture)

    return explain
