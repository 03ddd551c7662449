"""Cases for test_fuzz*.py: how many of each kind, how values and files are mangled.

    SAE_GATED_FUZZ=20000 python -m pytest tests/project/test_fuzz*.py

runs at least that many, other ones each time, in some ten minutes; without the variable the same
few hundred run in seconds. The last lines tell how many ran of each kind. A case that takes more
than five seconds fails.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_gated_plugin.errors import LONGEST_TEXT, SaeGatedError
from sae_gated_plugin.publish.card import BEGIN, END

TOTAL = int(os.environ.get("SAE_GATED_FUZZ", "0"))
RAN: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()
RUNNING: list[str] = []

#: Of 20,000 cases so many of each kind, the cheap ones most; without the variable, the others.
KINDS = {
    "configuration": (4000, 60),
    "override": (2500, 40),
    "sweep": (600, 10),
    "toy": (600, 10),
    "YAML": (3500, 60),
    "run folder": (1800, 30),
    "checkpoint": (800, 10),
    "tensors": (600, 10),
    "their SAE": (150, 5),
    "card": (1700, 20),
    "hand-written card": (800, 20),
    "results": (1200, 20),
    "report": (40, 1),
    "Hub list": (400, 8),
    "Hub load": (150, 4),
    "Hub push": (150, 4),
    "plugin": (800, 20),
    "metric": (600, 10),
    "evaluation": (20, 1),
    "loss": (400, 10),
}


def fuzz(kind: str, *strategies: Any, **named: Any) -> Callable[[Any], Any]:
    """A test of so many cases of its kind, counted, five seconds for each."""
    most, few = KINDS[kind]

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def counted(*arguments: Any, **keywords: Any) -> None:
            RAN.update([kind])
            RUNNING[:] = [kind]
            test(*arguments, **keywords)

        return settings(
            max_examples=math.ceil(most * TOTAL / 20_000) or few,
            deadline=5000,
            derandomize=not TOTAL,
            database=None,
            phases=set(Phase) - {Phase.explain},  # traces, and is slower than five seconds
            suppress_health_check=list(HealthCheck),
        )(given(*strategies, **named)(counted))

    return decorate


def sentence(action: Callable[[], Any], *errors: type[SaeGatedError]) -> Any:
    """What the action returns, or None where it raises an error of ours that a person can read."""
    try:
        return action()
    except SaeGatedError as error:
        if errors and not isinstance(error, errors):
            raise
        said = str(error)
        assert 10 < len(said) <= LONGEST_TEXT + 100
        assert said.isprintable()
        REFUSED.update(RUNNING)
        return None


# --- what is put in -------------------------------------------------------------------------------

HAZARDS = [
    "---", "\n---\n", "a: b", "<script>alert(1)</script>", "| x |", "```\n", "``", BEGIN, END,
    "[x](javascript:alert(1))", "![i](http://x/y)", "\u2028", "\x85", "\x00", "\ud800", "{{ 7*7 }}",
    "{% raw %}", "&lt;", "!!python/object:os.system x", "'", '"', "# h", "\r\n# h", "\n\n<b>", "*a",
    "&a", "-", "null", "../../x", "</details>", "<!--", "-->", "\\",
    "é漢🎉\u202e", "~~~", "x" * 3000,
]  # fmt: skip
TEXT = st.text(max_size=12) | st.sampled_from(HAZARDS)
TEXT |= st.lists(st.sampled_from(HAZARDS), max_size=4).map("".join)
NUMBERS = st.integers(-5, 5) | st.sampled_from([2**31, 2**63, -(10**20), 10**400, 1e300, 1e30, 3.5])
NUMBERS |= st.floats() | st.sampled_from([-0.5, 0.5, math.nan, math.inf, -math.inf, 5e-324])
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Where something could be put in a tree of mappings and lists."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [(k, *rest) for k, inner in items for rest in [(), *paths(inner)]]


def nudged(value: Any) -> Any:
    """Values of the same kind, most of them as good as the one that is there."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.integers(-1, 200)
    return st.floats(-0.1, 1.1) | NUMBERS if isinstance(value, float) else TEXT


@st.composite
def mutated(draw: Any, values: list[Any], names: list[str]) -> Any:
    """One of the values with up to three changes: replaced, nudged, gone, added or misspelt."""
    value = copy.deepcopy(draw(st.sampled_from(values)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        known = paths(value)
        if not known:
            break
        *way, last = draw(st.sampled_from(known))
        inner = value
        for step in way:
            inner = inner[step]
        kind = draw(st.sampled_from(["set", "nudge", "nudge", "nudge", "add", "gone", "misspelt"]))
        if kind == "nudge" and not isinstance(inner[last], dict | list | None):
            inner[last] = draw(nudged(inner[last]))
        elif kind in ("set", "nudge") or isinstance(inner, list):
            inner[last] = draw(JUNK)
        elif kind == "add":
            inner[draw(st.sampled_from(names) | TEXT)] = draw(JUNK)
        else:
            held = inner.pop(last)
            if kind == "misspelt":
                inner[f"{last}s" if draw(st.booleans()) else str(last)[1:]] = held
    return value


@st.composite
def spliced(draw: Any, contents: list[bytes], pieces: list[bytes]) -> bytes:
    """One of the contents with up to four changes: cut, doubled, overwritten, put in between."""
    content = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(0, 4))):
        start, end = sorted(draw(st.integers(0, len(content))) for _ in range(2))
        new = draw(st.sampled_from([*pieces, b"", content[start:end] * 2]) | st.binary(max_size=9))
        content = content[:start] + new + content[end if draw(st.booleans()) else start :]
    return content


#: The names of everything that a configuration may say.
FIELDS = sorted(
    {
        field.name
        for _, cls in SAE_TRAINING_CLASS_REGISTRY.values()
        for field in dataclasses.fields(cls)
    }
    | {
        f.name
        for cls in (LanguageModelSAERunnerConfig, LoggingConfig)
        for f in dataclasses.fields(cls)
    }
)
