"""Discovery, isolation, listing, and the bridge into SAELens's registries.

A plugin is a module with `@hookimpl` functions, named in the entry-point group `sae_lens`. One that
does not load or registers something unusable is skipped with a warning and listed as failed; what
it had registered until then is dropped. It never breaks `import sae_lens`. One that a script began
to import before SAELens cannot be read yet: it waits, and is taken up when it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy
import sae_lens.registry
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

from . import hookspecs
from .errors import PluginError, UnknownArchitecture, unknown_name
from .hook_points import first_line

GROUP = hookspecs.PROJECT
OURS = "sae-gated-plugin"
HOST = "sae-lens"
NOUNS = {
    "architectures": "architecture",
    "losses": "loss",
    "metrics": "metric",
    "loaders": "loader",
}

#: Keys that results have besides the registered metrics: no metric may take their place.
# fmt: off
RESULT_KEYS = frozenset((
    "architecture", "d_in", "d_sae", "model_name", "hook_name", "dataset", "tokens",
    "training_tokens", "l1_coefficient", "target_l0", "loss_recovered", "nats_lost", "kl",
    "coherence", "coherence_top", "babel", "undefined", "histograms", "split", "path", "seconds",
    "versions", "label", "seed", "settings", "figure", "true_l0", "mmcs_features", "mmcs_latents",
    "features_found", "feature_precision", "firing_recall", "firing_precision",
    "composites_found", "b_dec_norm", "matches", "heatmap",
))
# fmt: on

logger = logging.getLogger("sae_gated_plugin")


@dataclass
class PluginInfo:
    """A plugin, as `sae-gated plugins` lists it.

    status: "ok", "failed" (error says why) or "waiting" (it is being imported at this moment).
    """

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
    releases: dict[str, PretrainedSAELookup] = field(default_factory=dict[str, PretrainedSAELookup])
    plugins: list[PluginInfo] = field(default_factory=list[PluginInfo])


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
        others = sys.modules.keys() - {"sae_lens", __package__}
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
        owner = owners.get((kind, name)) or _host_owner(kind, name)
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
            if held is not None and held is not _handed_over.releases.get(release):
                owner = HOST
            if owner:
                raise PluginError(f"Release '{release}' is already owned by {owner}.")
            owners["releases", release] = _owner_id(info)
            offered.releases[release] = _release(release, about, name)

    registrars = {"architectures": register_architecture, "loaders": register_loader}
    return registrars.get(kind, register_callable)


def _release(name: str, about: Mapping[str, Any], loader: str) -> PretrainedSAELookup:
    """A release as SAELens's directory has it. Raises PluginError for what is missing."""
    missing = {"repo_id", "model", "saes"} - set(about)
    texts = (name, about.get("repo_id"), about.get("model"))
    fits = isinstance(about.get("saes"), Mapping) and all(isinstance(t, str) for t in texts)
    if missing or not fits or not about["saes"]:
        raise PluginError(f"Release '{name}' needs repo_id, model and saes (sae_id → path).")
    saes = {str(sae_id): str(path) for sae_id, path in about["saes"].items()}
    return PretrainedSAELookup(
        release=name,
        repo_id=about["repo_id"],
        model=about["model"],
        conversion_func=loader,
        saes_map=saes,
        expected_var_explained=dict.fromkeys(saes, 1.0),
        expected_l0=dict.fromkeys(saes, 0.0),
        neuronpedia_id={},
        norm_scaling_factor={},
        config_overrides=about.get("config_overrides"),
    )


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
    """Who holds the name in SAELens: SAELens, or whoever wrote into its registries; never we."""
    if kind == "loaders":
        held, ours = NAMED_PRETRAINED_SAE_LOADERS.get(name), _handed_over.loaders.get(name)
        return HOST if held is not None and held is not ours else None
    if kind == "architectures":
        ours = _handed_over.architectures.get(name, Architecture(None, None))
        owners: set[str] = set()
        for held, own in (
            (SAE_TRAINING_CLASS_REGISTRY.get(name), ours.training),
            (SAE_CLASS_REGISTRY.get(name), ours.inference),
        ):
            if held is not None and held != own:
                module = held[0].__module__
                owners.add(HOST if module.startswith("sae_lens.") else f"module {module}")
        return min(owners - {HOST} or owners, default=None)
    return None


# --- the bridge -----------------------------------------------------------------------------------

_lock = threading.RLock()
_active: Registry | None = None
_activating = False
_handed_over = Registry()  # what the bridge wrote into SAELens's own tables


def activate() -> Registry:
    """Load every plugin and hand its architectures and loaders to SAELens; once per process.

    Called again, it only takes up plugins that were waiting. Raises PluginError when a plugin
    asks for the registry while it is being loaded.
    """
    global _active, _activating
    with _lock:
        if _activating:
            raise PluginError("Plugins are being loaded: the registry can be read once they are.")
        first = _active is None
        if _active is None or any(info.status == "waiting" for info in _active.plugins):
            _activating = True
            try:
                _active = collect(make_manager())
                _bridge(_active)
            finally:
                _activating = False
            if first:
                _explain_unknown_architectures()
                if "gated" in _active.architectures:
                    logger.info("`gated` is now the Gated SAE of %s.", OURS)
            warn_of_failures(_active)  # last: where warnings are errors, the rest is in place
        return _active


def registry() -> Registry:
    """What is active in this process."""
    return activate()


def _bridge(active: Registry) -> None:
    for name, architecture in active.architectures.items():
        # Inference first: a training config looks its inference class up while it is built.
        # `register_sae_class` would refuse the name `gated`.
        _handed_over.architectures[name] = architecture
        if architecture.inference is not None:
            SAE_CLASS_REGISTRY[name] = architecture.inference
        if architecture.training is not None:
            SAE_TRAINING_CLASS_REGISTRY[name] = architecture.training
    _handed_over.loaders.update(active.loaders)
    NAMED_PRETRAINED_SAE_LOADERS.update(active.loaders)
    if active.releases:  # SAELens's list takes a while to read
        _handed_over.releases.update(active.releases)
        get_pretrained_saes_directory().update(active.releases)


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
            with contextlib.suppress(PluginError):
                activate()  # its plugin may have been waiting
        if architecture not in known:
            raise UnknownArchitecture(unknown_name("architecture", architecture, known))
        return lookup(architecture)

    return explain
