"""Hooks, isolation and ownership, on fresh managers."""

from __future__ import annotations

import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import sae_lens
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from support.interpreter import Interpreter

import sae_gated_plugin
from sae_gated_plugin.errors import PluginError, UnknownArchitecture
from sae_gated_plugin.plugins import hookspecs
from sae_gated_plugin.plugins import host as plugins
from sae_gated_plugin.plugins.bridge import activate, registry
from sae_gated_plugin.plugins.hookspecs import hookimpl
from sae_gated_plugin.plugins.host import (
    Manager,
    collect,
    make_manager,
    warn_of_failures,
)
from sae_gated_plugin.plugins.records import PluginInfo, Registry

STANDARD = {
    "training": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig),
    "inference": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
}


def plugin(name: str, **hooks: Any) -> Any:
    module = types.ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    return module


def registering(*names: str, **options: Any) -> Any:
    def register_architectures(register: Any) -> None:
        for name in names:
            register(name, **{**STANDARD, **options})

    return register_architectures


def collected(*modules: Any) -> Registry:
    manager = make_manager(load_entry_points=False)
    for module in modules:
        manager.add(module, f"{module.__name__}-dist", "1.0")
    found = collect(manager)
    warn_of_failures(found)
    return found


def skipped(*modules: Any, sentence: str) -> Registry:
    """What is left when the last module is skipped with a warning that matches the sentence."""
    with pytest.warns(RuntimeWarning, match=sentence):
        found = collected(*modules)
    assert [info.status for info in found.plugins] == ["ok"] * (len(modules) - 1) + ["failed"]
    return found


HOOKS = [name for name in vars(hookspecs) if name.startswith("register_")]


def test_every_hook_is_in_the_readme_and_tested_here() -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    tests = Path(__file__).read_text()
    assert len(HOOKS) == 4
    for hook in HOOKS:
        assert hook in readme, hook
        assert f"def {hook}(" in tests, hook


def test_all_four_hooks_reach_the_registry() -> None:
    def register_architectures(register: Any) -> None:
        register("mine", **STANDARD)

    def register_losses(register: Any) -> None:
        register("zero", lambda acts, norms, n: acts.sum() * 0)

    def register_metrics(register: Any) -> None:
        register("answer", lambda: 42)

    def register_loaders(register: Any) -> None:
        register("mine", lambda **_: None)

    found = collected(
        plugin(
            "complete",
            register_architectures=register_architectures,
            register_losses=register_losses,
            register_metrics=register_metrics,
            register_loaders=register_loaders,
        )
    )
    assert found.architectures["mine"].training == STANDARD["training"]
    assert set(found.losses) == {"zero"}
    assert found.metrics["answer"]() == 42
    assert set(found.loaders) == {"mine"}
    assert found.plugins[0].as_dict() == {
        "distribution": "complete-dist",
        "version": "1.0",
        "module": "complete",
        "hooks": sorted(HOOKS),
        "status": "ok",
        "error": None,
        "brings": {
            "architectures": ["mine"],
            "losses": ["zero"],
            "metrics": ["answer"],
            "loaders": ["mine"],
        },
    }


def test_a_metric_says_how_it_is_shown() -> None:
    def register_metrics(register: Any) -> None:
        register("glow", lambda: None, title="share that glows", format=".1%", direction="up")
        register("bare", lambda: None)

    shown = collected(plugin("facts", register_metrics=register_metrics)).measures
    assert (shown["glow"].title, shown["glow"].text(0.25)) == ("share that glows", "25.0%")
    assert shown["glow"].direction == "up"
    assert (shown["bare"].title, shown["bare"].text(1234567.0)) == ("bare", "1.235e+06")


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"format": ".2q"}, r"the format '\.2q' does not fit numbers; try '\.4g'"),
        ({"format": 3}, "the format 3 does not fit numbers"),
        ({"title": "two\nlines"}, "the title must be printable text, not 'two"),
        ({"direction": "left"}, "the direction must be 'up', 'down' or None, not 'left'"),
    ],
)
def test_a_metric_that_cannot_be_shown_is_refused(facts: dict[str, Any], sentence: str) -> None:
    def register_metrics(register: Any) -> None:
        register("glow", lambda: None, **facts)

    bad = plugin("facts", register_metrics=register_metrics)
    found = skipped(bad, sentence=f"skipped: .*Metric 'glow': {sentence}")
    assert (found.metrics, found.plugins[0].brings) == ({}, {})


def test_built_ins_come_through_entry_points_and_saelens_has_them() -> None:
    active = sae_gated_plugin.registry()
    ours = {p.module for p in active.plugins if p.distribution == "sae-gated-plugin"}
    assert "sae_gated_plugin.architectures.gated" in ours
    assert "sae_gated_plugin.objectives.losses" in ours
    for name, architecture in active.architectures.items():
        if architecture.training:
            assert SAE_TRAINING_CLASS_REGISTRY[name] == architecture.training
        if architecture.inference:
            assert SAE_CLASS_REGISTRY[name] == architecture.inference
    assert sae_gated_plugin.activate() is active


def test_a_misspelt_hook_is_an_error_naming_the_plugin_and_the_hooks() -> None:
    with pytest.raises(PluginError) as caught:
        collected(plugin("typo", register_architecture=lambda register: None))
    assert str(caught.value) == (
        "Plugin 'typo' of typo-dist: unknown hook 'register_architecture' in plugin "
        "<module 'typo'>; hooks are register_architectures, register_losses, register_metrics, "
        "register_loaders."
    )


def test_a_module_without_hooks_is_an_error() -> None:
    forgotten = types.ModuleType("forgotten")
    forgotten.register_losses = lambda register: None  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"'forgotten' .* no functions marked @hookimpl; hooks"):
        collected(forgotten)


def test_a_failing_plugin_is_skipped_named_and_leaves_nothing() -> None:
    def register_architectures(register: Any) -> None:
        register("half_done", **STANDARD)
        raise RuntimeError("out of luck")

    bad = plugin("bad", register_architectures=register_architectures)
    good = plugin("good", register_architectures=registering("half_done"))
    with pytest.warns(RuntimeWarning, match=r"'bad' of bad-dist 1.0 was skipped: .*out of luck"):
        found = collected(bad, good)
    assert [p.status for p in found.plugins] == ["failed", "ok"]
    # The name is free for the next one: nothing of the failed registration stayed behind.
    assert set(found.architectures) == {"half_done"}


def test_a_plugin_that_exits_is_skipped_too() -> None:
    quitter = plugin("quitter", register_losses=lambda register: sys.exit("I am a script"))
    skipped(quitter, sentence="'quitter' .* SystemExit: I am a script")


def test_an_interrupt_is_not_a_plugins_failure() -> None:
    def register_losses(register: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(plugin("slow", register_losses=register_losses))


def test_two_owners_of_a_name_are_both_named() -> None:
    first = plugin("first", register_architectures=registering("shared"))
    second = plugin("second", register_architectures=registering("shared"))
    sentence = r"'shared' is already owned by first-dist \(first\); second-dist \(second\) must"
    skipped(first, second, sentence=sentence)


def of_ours(hook: Any) -> Registry:
    manager = make_manager(load_entry_points=False)
    manager.add(plugin("ours", register_architectures=hook), "sae-gated-plugin")
    return collect(manager)


OVERRIDE = registering("gated", replaces="sae_lens")


@pytest.mark.parametrize("name", ["standard", "topk"])
@pytest.mark.parametrize("options", [{}, {"replaces": "sae_lens"}])
def test_saelens_names_are_taken(name: str, options: dict[str, str]) -> None:
    thief = plugin("thief", register_architectures=registering(name, **options))
    skipped(thief, sentence=f"'{name}' is already owned by sae-lens")


def test_gated_is_the_one_sanctioned_override_and_ours_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = (sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig)
    monkeypatch.setitem(SAE_TRAINING_CLASS_REGISTRY, "gated", plain)
    thief = plugin("thief", register_architectures=OVERRIDE)
    skipped(thief, sentence="'gated' is already owned by sae-lens")
    assert "gated" in of_ours(OVERRIDE).architectures


@pytest.mark.parametrize(
    ("registry_", "name", "base", "config"),
    [
        (
            SAE_TRAINING_CLASS_REGISTRY,
            "direct",
            sae_lens.StandardTrainingSAE,
            sae_lens.StandardTrainingSAEConfig,
        ),
        (SAE_CLASS_REGISTRY, "gated", sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    ],
)
def test_names_registered_with_saelens_directly_have_an_owner(
    monkeypatch: pytest.MonkeyPatch, registry_: Any, name: str, base: Any, config: Any
) -> None:
    """An inference class for `gated` too: not even our override replaces it."""
    outsider = type("Outsider", (base,), {"__module__": "outsider.module"})
    monkeypatch.setitem(registry_, name, (outsider, config))
    (info,) = of_ours(registering(name, replaces="sae_lens")).plugins
    assert "already owned by module outsider.module" in str(info.error)


@pytest.mark.parametrize(
    ("kind", "call", "sentence"),
    [
        *(
            ("architectures", {"training": training}, r"'x': training must be \(a subclass of Tra")
            for training in [(int, str), (sae_lens.StandardTrainingSAE,), "StandardTrainingSAE"]
        ),
        ("architectures", {}, "neither training nor inference"),
        ("losses", {"function": 3}, "Loss 'x' is not callable: 3"),
        ("loaders", {"function": None}, "Loader 'x' is not callable: None"),
        ("metrics", {"factory": int, "name": "tokens"}, "'tokens': results have another thing"),
        *(
            ("metrics", {"factory": int, "name": name}, "Metric: a name must be a printable, non-")
            for name in [3, "", None, "a\nb"]
        ),
    ],
)
def test_what_is_registered_is_checked(kind: str, call: dict[str, Any], sentence: str) -> None:
    hook = {f"register_{kind}": lambda register: register(**{"name": "x", **call})}
    skipped(plugin("bad", **hook), sentence=sentence)


@pytest.mark.parametrize(
    "lookup",
    [
        lambda name: sae_lens.SAE.from_dict({"architecture": name}),
        lambda name: sae_lens.TrainingSAEConfig.from_dict({"architecture": name}),
        lambda name: sae_lens.registry.get_sae_class(name),
    ],
)
def test_an_unknown_architecture_is_a_sentence_everywhere(lookup: Any) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        lookup("prolo")
    assert str(caught.value).startswith("Unknown architecture 'prolo'; known: ")
    assert str(caught.value).endswith("Did you mean 'prolu'?")
    assert isinstance(caught.value, KeyError)


def test_one_line_says_that_gated_is_ours(interpreter: Interpreter) -> None:
    code = (
        "import logging; logging.basicConfig(level='INFO')\n"
        "import sae_lens, sae_gated_plugin as p\n"
        "p.activate(); p.activate()\n"
    )
    done = interpreter.run(code)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "sae_gated_plugin" in line]
    assert lines == ["INFO:sae_gated_plugin:`gated` is now the Gated SAE of sae-gated-plugin."]


@pytest.fixture
def third_parties(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A process that has not activated yet; the modules put into the list are installed in it."""
    modules: list[Any] = []
    installed = plugins.make_manager

    def make() -> Manager:
        manager = installed()
        for module in modules:
            manager.add(module, f"{module.__name__}-dist", "1.0")
        return manager

    for table in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, NAMED_PRETRAINED_SAE_LOADERS):
        monkeypatch.setitem(table, "guest", None)  # so that what is written there is undone
        del table["guest"]
    monkeypatch.setattr("sae_gated_plugin.plugins.host.make_manager", make)
    monkeypatch.setattr("sae_gated_plugin.plugins.bridge._active", None)
    return modules


def test_a_waiting_plugin_is_taken_up_by_the_next_look(
    third_parties: list[Any],
) -> None:
    loader = lambda **_: None  # noqa: E731
    early = plugin("early", register_loaders=lambda register: register("guest", loader))
    third_parties.append(early)
    first = activate()
    first.plugins.append(PluginInfo("late-dist", "1.0", "late", status="waiting"))
    third_parties.append(plugin("late", register_architectures=registering("guest")))
    # What the first pass handed to SAELens, loaders too, has no other owner in the second.
    assert sae_lens.registry.get_sae_class("guest") == STANDARD["inference"]
    again = registry()
    assert [p.status for p in again.plugins if p.module in ("early", "late")] == ["ok", "ok"]
    assert again.loaders["guest"] is loader
    assert registry() is again


def test_a_plugin_that_asks_for_the_registry_too_early_is_told_so(third_parties: list[Any]) -> None:
    third_parties.append(plugin("eager", register_losses=lambda register: registry()))
    with pytest.warns(RuntimeWarning, match="'eager' .* Plugins are being loaded: the registry"):
        active = activate()
    assert "gated" in active.architectures


def test_where_warnings_are_errors_everything_else_is_active(third_parties: list[Any]) -> None:
    third_parties.append(plugin("bad", register_losses=lambda register: register("three", 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=r"'bad' of bad-dist 1\.0 was skipped"):
            activate()
        assert "gated" in activate().architectures


def test_threads_activate_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import threading

    monkeypatch.setattr("sae_gated_plugin.plugins.bridge._active", None)
    results: list[Registry] = []
    threads = [threading.Thread(target=lambda: results.append(activate())) for _ in range(16)]
    with caplog.at_level(logging.INFO, "sae_gated_plugin"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 16
    assert len({id(result) for result in results}) == 1
    assert len(caplog.records) == 1
