"""Discovery, isolation and ownership of plugins.

A plugin is a module with `@hookimpl` functions, named in the entry-point group `sae_lens`. One that
does not load or registers something unusable is skipped with a warning and listed as failed; what
it had registered until then is dropped. It never breaks `import sae_lens`. One whose import is
still under way, because it imported SAELens itself, waits and is taken up when it is asked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

from ..errors import PluginError, first_line
from ..results import MEASURES, RESULT_KEYS, Direction, Measure
from . import hookspecs
from .records import GROUP, OURS, About, Architecture, PluginInfo, Registry
from .saelens_tables import HOST, as_release, owner_of


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
                f"Plugin '{name}' of {distribution}: {error}; hooks are register_architectures, "
                "register_losses, register_metrics, register_loaders."
            ) from error
        info = PluginInfo(distribution, version, name, hooks)
        self.infos.append((plugin, info))
        return info


def make_manager(load_entry_points: bool = True) -> Manager:
    """A fresh manager, by default with every installed plugin that can be imported."""
    manager = Manager()
    found: dict[str, EntryPoint] = {}  # by module: sys.path may hold two installs of one plugin
    for entry_point in entry_points(group=GROUP) if load_entry_points else ():
        found.setdefault(entry_point.value, entry_point)
    for entry_point in found.values():
        _add_installed(manager, entry_point)
    return manager


@contextmanager
def _isolated(info: PluginInfo) -> Generator[None]:
    """Record whatever a plugin raises as its failure; panics of compiled code are no Exception."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        info.status, info.error = "failed", first_line(error)


def _add_installed(manager: Manager, entry_point: EntryPoint) -> None:
    info = PluginInfo("an unknown distribution", "", entry_point.value)
    with _isolated(info):
        if entry_point.dist:
            info.distribution, info.version = entry_point.dist.name, entry_point.dist.version
        if not _being_imported(entry_point.module):
            manager.add(entry_point.load(), info.distribution, info.version)
            return
        info.status = "waiting"
    # `cannot import name … from partially initialized module '…'`: not its fault, just early.
    others = sys.modules.keys() - {"sae_lens", "sae_gated_plugin"}
    if any(f"module '{name}'" in (info.error or "") and _being_imported(name) for name in others):
        info.status, info.error = "waiting", None
    manager.infos.append((None, info))


def _being_imported(module: str) -> bool:
    """Whether a caller further up the stack, or another thread, is importing the module."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return getattr(spec, "_initializing", False)


def collect(manager: Manager) -> Registry:
    """Call every plugin's hooks; one that raises has failed."""
    result = Registry(plugins=[info for _, info in manager.infos])
    owners: dict[tuple[str, str], str] = {}
    for plugin, info in manager.infos:
        if info.status != "ok":
            continue
        registrar = Registrar(info, dict(owners))
        others = [other for other in manager.get_plugins() if other is not plugin]
        with _isolated(info):
            for hook in info.hooks:
                register = getattr(registrar, hook.removeprefix("register_"))
                manager.subset_hook_caller(hook, others)(register=register)
        if info.status == "ok":
            owners = registrar.owners
            for kind in sorted(vars(result).keys() - {"plugins"}):
                getattr(result, kind).update(getattr(registrar.offered, kind))
                if kind != "measures" and getattr(registrar.offered, kind):
                    info.brings[kind] = sorted(getattr(registrar.offered, kind))
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


class Registrar:
    """What one plugin's hooks call: each method is the `register` of the hook of its name.

    owners: (kind, name) → owner, of what earlier plugins registered; this one's names are added.
    What is offered is kept apart until all of the plugin's hooks have run.
    """

    def __init__(self, info: PluginInfo, owners: dict[tuple[str, str], str]):
        self.info, self.owners, self.offered = info, owners, Registry()

    def architectures(
        self,
        name: str,
        *,
        training: tuple[type[Any], type[Any]] | None = None,
        inference: tuple[type[Any], type[Any]] | None = None,
        replaces: str | None = None,
        about: About | None = None,
    ) -> None:
        """Register the classes of an architecture; either pair may be left out.

        training: subclasses of SAELens's TrainingSAE and TrainingSAEConfig. inference: of its SAE
        and SAEConfig. replaces: "sae_lens" for the one override that is allowed, our own `gated`.
        about: what cards, exports and reports need to know of it.
        """
        if training is None and inference is None:
            raise PluginError(f"Architecture '{name}' has neither training nor inference classes.")
        _require_classes(name, "training", training, (TrainingSAE, TrainingSAEConfig))
        _require_classes(name, "inference", inference, (SAE, SAEConfig))
        given: Any = about  # whatever a plugin passed
        if not isinstance(given, About | None):
            raise PluginError(f"Architecture '{name}': about must be an About(…); got {about!r}.")
        ours = (name, replaces, self.info.distribution) == ("gated", "sae_lens", OURS)
        self._claim("architecture", name, may_replace_host=ours)
        self.offered.architectures[name] = Architecture(training, inference, about)

    def losses(self, name: str, function: Callable[..., Any]) -> None:
        """Register a sparsity loss: (acts, decoder_norms, n_tokens) → 0-d tensor; see losses.py."""
        self._claim("loss", name, function)
        self.offered.losses[name] = function

    def metrics(
        self,
        name: str,
        factory: Callable[[], Any],
        *,
        title: str | None = None,
        format: str = ".4g",
        direction: Direction | None = None,
    ) -> None:
        """Register a metric: factory() has `update(batch)` and `compute()`; see batch.py.

        title, format, direction: how tables show it, as `results.Measure` says.
        """
        self._claim("metric", name, factory)
        if name in RESULT_KEYS or name.endswith("_ci"):
            raise PluginError(f"Metric '{name}': results have another thing of that name.")
        try:
            measure = Measure(name, title or name, name, format, direction)
        except ValueError as error:
            raise PluginError(f"Metric '{name}': {error}.") from None
        self.offered.measures[name] = MEASURES.get(name, measure)
        self.offered.metrics[name] = factory

    def loaders(
        self,
        name: str,
        function: Callable[..., Any],
        releases: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Register a loader, a function as SAELens's `PretrainedSaeHuggingfaceLoader`.

        releases: short name → {"repo_id": ..., "model": ..., "saes": {sae_id: path in the
        repository}}, for `SAE.from_pretrained("short name", sae_id)`. For weights in SAELens's own
        format the loader is its `sae_lens_huggingface_loader`.
        """
        self._claim("loader", name, function)
        self.offered.loaders[name] = function
        for release, about in (releases or {}).items():
            self._claim("release", release)
            self.offered.releases[release] = as_release(release, about, name)

    def _claim(self, kind: str, name: Any, *functions: Any, may_replace_host: bool = False) -> None:
        """Make a name this plugin's. Raises PluginError for one that is no name or has an owner."""
        noun = kind.capitalize()
        for function in functions:
            if not callable(function):
                raise PluginError(f"{noun} '{name}' is not callable: {function!r}.")
        if not isinstance(name, str) or not name or not name.isprintable():
            raise PluginError(
                f"{noun}: a name must be a printable, non-empty string; got {name!r}."
            )
        owner = self.owners.get((kind, name)) or owner_of(kind, name)
        if owner and not (may_replace_host and owner == HOST):
            raise PluginError(
                f"{noun} '{name}' is already owned by {owner}; {self.info} must choose another "
                "name."
            )
        self.owners[kind, name] = str(self.info)


def _require_classes(name: str, role: str, pair: Any, bases: tuple[Any, ...]) -> None:
    given: Any = pair if isinstance(pair, tuple) else ()
    fits = [isinstance(one, type) and issubclass(one, base) for one, base in zip(given, bases)]
    if pair is not None and (len(given) != len(bases) or not all(fits)):
        wanted = ", ".join(f"a subclass of {base.__name__}" for base in bases)
        raise PluginError(f"Architecture '{name}': {role} must be ({wanted}); got {pair!r}.")
