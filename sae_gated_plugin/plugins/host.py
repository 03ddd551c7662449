"""Discovery, isolation, listing, and the bridge into SAELens's registries.

A plugin is a module with `@hookimpl` functions, named in the entry-point group `sae_lens`. One that
does not load or registers something unusable is skipped with a warning and listed as failed; what
it had registered until then is dropped. It never breaks `import sae_lens`. One that a script began
to import before SAELens cannot be read yet: it waits, and is taken up when it is asked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

from ..errors import PluginError, first_line
from ..results import RESULT_KEYS
from . import hookspecs
from .records import (
    GROUP,
    HOST,
    NOUNS,
    OURS,
    Architecture,
    PluginInfo,
    Registry,
    handed_over,
    host_owner,
    release_of,
)


class Manager(pluggy.PluginManager):
    """pluggy's manager, with one record per plugin."""

    def __init__(self) -> None:
        super().__init__(GROUP)
        self.add_hookspecs(hookspecs)
        self.infos: list[tuple[Any, PluginInfo]] = []

    def add(self, plugin: Any, distribution: str, version: str = "") -> PluginInfo:
        """Register a module or object. Raises PluginError unless its hooks are ones that exist."""
        name = getattr(plugin, "__name__", type(plugin).__name__)
        try:
            self.register(plugin, name)
            self.check_pending()
            hooks = sorted(caller.name for caller in self.get_hookcallers(plugin) or [])
            if not hooks:
                raise ValueError("it has no functions marked @hookimpl")
        except Exception as error:
            if self.is_registered(plugin):  # or the next plugin would be blamed for its hooks
                self.unregister(plugin)
            raise PluginError(
                f"Plugin '{name}' of {distribution}: {error}; "
                f"hooks are {', '.join(f'register_{kind}' for kind in NOUNS)}."
            ) from error
        info = PluginInfo(distribution, version, name, hooks)
        self.infos.append((plugin, info))
        return info


def make_manager(load_entry_points: bool = True) -> Manager:
    """A fresh manager, by default with every installed plugin that can be imported."""
    manager = Manager()
    seen: set[str] = set()
    for entry_point in entry_points(group=GROUP) if load_entry_points else ():
        if entry_point.value not in seen:  # two installs of one distribution on sys.path
            seen.add(entry_point.value)
            _add_installed(manager, entry_point)
    return manager


def _add_installed(manager: Manager, entry_point: EntryPoint) -> None:
    info = PluginInfo("an unknown distribution", "", entry_point.value, status="failed")
    try:
        if entry_point.dist:
            info.distribution, info.version = entry_point.dist.name, entry_point.dist.version
        if _being_imported(entry_point.module):
            info.status = "waiting"
        else:
            manager.add(entry_point.load(), info.distribution, info.version)
            return
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of compiled extensions, too, are no Exception
        info.error = first_line(error)
        # `cannot import name … from partially initialized module '…'`: not its fault, just early.
        others = sys.modules.keys() - {"sae_lens", "sae_gated_plugin"}
        if any(f"module '{name}'" in info.error and _being_imported(name) for name in others):
            info.status, info.error = "waiting", None
    manager.infos.append((None, info))


def _being_imported(module: str) -> bool:
    """Whether somebody further up the stack, or another thread, is importing the module."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return getattr(spec, "_initializing", False)


def collect(manager: Manager, strict: bool = False) -> Registry:
    """Call every plugin's hooks. strict: raise the first error; otherwise the plugin has failed."""
    result = Registry(plugins=[info for _, info in manager.infos])
    owners: dict[tuple[str, str], str] = {}
    for plugin, info in manager.infos:
        if info.status != "ok":
            continue
        offered, claimed = Registry(), dict(owners)
        try:
            for hook in info.hooks:
                others = [p for p in manager.get_plugins() if p is not plugin]
                call = manager.subset_hook_caller(hook, others)
                call(register=_registrar(hook, info, offered, claimed))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if strict:
                raise
            info.status, info.error = "failed", first_line(error)
        else:
            owners = claimed
            for kind in (*NOUNS, "releases"):
                getattr(result, kind).update(getattr(offered, kind))
    return result


def warn_of_failures(found: Registry) -> None:
    """One RuntimeWarning for each plugin that was skipped, naming its distribution and why."""
    for info in found.plugins:
        if info.status == "failed":
            warnings.warn(
                f"Plugin '{info.module}' of {info.distribution} {info.version} was skipped: "
                f"{info.error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _owner_id(info: PluginInfo) -> str:
    return f"{info.distribution} ({info.module})"


def _registrar(
    hook: str, info: PluginInfo, offered: Registry, owners: dict[tuple[str, str], str]
) -> Callable[..., None]:
    kind = hook.removeprefix("register_")
    noun = NOUNS[kind].capitalize()

    def claim(name: str, replaces: str | None = None) -> None:
        given: Any = name  # whatever a stranger passed
        if not isinstance(given, str) or not given or not given.isprintable():
            raise PluginError(
                f"{noun}: a name must be a printable, non-empty string; got {name!r}."
            )
        if kind == "metrics" and (name in RESULT_KEYS or name.endswith("_ci")):
            raise PluginError(f"Metric '{name}': results have another thing of that name.")
        owner = owners.get((kind, name)) or host_owner(kind, name)
        sanctioned = (kind, name, replaces, info.distribution) == (
            "architectures",
            "gated",
            "sae_lens",
            OURS,
        )
        if owner and not (sanctioned and owner == HOST):
            raise PluginError(
                f"{noun} '{name}' of {_owner_id(info)} is already owned by "
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
        offered.architectures[name] = Architecture(training, inference)

    def register_callable(name: str, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise PluginError(f"{noun} '{name}' is not callable: {function!r}.")
        claim(name)
        getattr(offered, kind)[name] = function

    def register_loader(
        name: str,
        function: Callable[..., Any],
        releases: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        register_callable(name, function)
        for release, about in (releases or {}).items():
            owner = owners.get(("releases", release))
            held = get_pretrained_saes_directory().get(release)
            if held is not None and held is not handed_over.releases.get(release):
                owner = HOST
            if owner:
                raise PluginError(f"Release '{release}' is already owned by {owner}.")
            owners["releases", release] = _owner_id(info)
            offered.releases[release] = release_of(release, about, name)

    registrars = {"architectures": register_architecture, "loaders": register_loader}
    return registrars.get(kind, register_callable)


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
