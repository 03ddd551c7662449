"""The card of a repository of SAEs: a pure function of configurations and results.

What is not known is said to be missing. Whatever a person writes outside the two marks, and other
keys of the front matter, stay as they are.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, cast

import jinja2
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import EvalResult

from ..config.check import convert_value, require_range
from ..config.run import QUICKSTART
from ..config.yaml import yaml_text
from ..errors import ConfigError, first_line
from ..model.hook_point import bridge_name
from ..plugins.about import SAELENS, in_words
from ..results import MEASURES, PROBE_KEYS, Measure, shortcomings

CARD_FILE = "README.md"
BEGIN = "<!-- sae-gated: from here to the end mark, every push writes this anew -->"
END = "<!-- sae-gated: end -->"

#: What the table and the model index show.
METRICS = tuple(
    MEASURES[key] for key in ("l0", "fvu", "gamma", "loss_recovered", "nats_lost", "dead_share")
)

#: And these where an SAE was probed.
PROBES = tuple(MEASURES[key] for key in PROBE_KEYS)

HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9_][\w.-]*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One SAE of a repository.

    sae_id: its folder. config: its cfg.json. results: its results.json, or None. run: its run.yaml
    or runner_cfg.json, or None.
    """

    sae_id: str
    config: Mapping[str, Any]
    results: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """SAELens's metadata, which until SAELens 5 stood among the rest, with other names."""
        if "metadata" in self.config:
            return self.config["metadata"] or {}
        hook_name = self.config.get("hook_name") or self.config.get("hook_point")
        return {**self.config, "hook_name": hook_name}

    @property
    def details(self) -> Mapping[str, Any]:
        """The options it was trained with."""
        return self.metadata.get("training_architecture_details") or {}

    @property
    def architecture(self) -> str:
        """The architecture it loads as."""
        return str(self.config.get("architecture") or "standard")

    @property
    def trained_as(self) -> str:
        """The architecture it was trained as."""
        return str(self.metadata.get("training_architecture") or self.architecture)

    @property
    def dataset(self) -> str:
        """What it was measured on, else trained on."""
        measured_on = (self.results or {}).get("dataset")
        return str(measured_on or self.metadata.get("dataset_path") or "unknown")

    @property
    def description(self) -> str:
        """The architecture and its options, in words."""
        words = in_words(self.trained_as, self.config)
        if self.metadata.get("fine_tuned_from"):
            words += f", fine-tuned from {self.metadata['fine_tuned_from']}"
        if self.architecture == self.trained_as:
            return words
        return f"{words}, saved in the form of SAELens's {self.architecture}"

    @property
    def plugin(self) -> str:
        """The plugin and its version that trained it, as far as that was recorded."""
        return str(self.details.get("plugin") or "")

    @property
    def penalty(self) -> str:
        """λ in SAELens's units and the paper's, and the target where there was one."""
        reached = self.metadata.get("l1_coefficient_reached")
        measured = (self.results or {}).get("l1_coefficient")
        coefficient = measured or reached or self.details.get("l1_coefficient")
        d_in, target = self.config.get("d_in"), self.details.get("target_l0")
        if not isinstance(coefficient, int | float) or not isinstance(d_in, int):
            return "no λ"
        paper = f"{coefficient / d_in:.4g} in the paper's"
        text = f"λ = {coefficient:.4g} in SAELens's units, {paper}"
        return f"{text}, reached by a controller for L0 = {target:g}" if target else text

    @property
    def bridged(self) -> str | None:
        """Its hook point's name in SAELens's SAETransformerBridge."""
        return bridge_name(str(self.metadata.get("hook_name")))

    @property
    def shortcomings(self) -> list[str]:
        """What it was meant to be and is not."""
        return list(shortcomings(self.results or {}).values())

    def value(self, measure: Measure) -> str:
        """A cell of the table: the number, with its interval, or that there is none."""
        if self.results is None:
            return "not measured"
        text = measure.text(self.results.get(measure.key))
        interval = self.results.get(f"{measure.key}_ci")
        return f"{text} [{', '.join(map(measure.text, interval))}]" if interval else text


@dataclass(frozen=True)
class Card:
    """What a card is made from.

    figures: titles by paths within the repository, those to show first. license: an SPDX name.
    revision: None for the main branch.
    """

    repo: str
    entries: Sequence[Entry]
    figures: Mapping[str, str] = field(default_factory=dict[str, str])
    license: str | None = None
    revision: str | None = None


#: What a card reads of an SAE's files, wherever it stands: any of it may be missing or null.
_HINTS: dict[str, Any] = {
    **dict.fromkeys(("d_in", "d_sae", "tokens", "training_tokens"), int | None),
    **dict.fromkeys(("architecture", "training_architecture", "plugin"), str | None),
    **dict.fromkeys(("model_name", "dataset_path", "hook_name", "dataset", "split"), str | None),
    "fine_tuned_from": str | None,
    **dict.fromkeys(("l1_coefficient", "l1_coefficient_reached", "target_l0"), float | None),
    **dict.fromkeys(("metadata", "training_architecture_details"), dict[str, Any] | None),
    **dict.fromkeys(("undefined", "versions"), dict[str, Any] | None),
    **dict.fromkeys((measure.key for measure in (*METRICS, *PROBES)), float | None),
    **dict.fromkeys(
        (f"{measure.key}_ci" for measure in (*METRICS, *PROBES)), tuple[float, float] | None
    ),
}


def require_readable(entry: Entry) -> None:
    """Raise ConfigError where an SAE's files hold something else than a card reads there."""

    def require(file: str, given: Any, names: Sequence[str] = tuple(_HINTS)) -> None:
        values = convert_value(dict[str, Any] | None, given, f"The {file} of '{entry.sae_id}'")
        for name in set(names) & (values or {}).keys():
            where = f"'{name}' in the {file} of '{entry.sae_id}'"
            require_range(name, convert_value(_HINTS[name], values[name], where), where)

    require("run", entry.run, ())
    require("results", entry.results)
    require("configuration", entry.config)
    require("metadata", entry.metadata)
    require("training details", entry.details, ("target_l0", "l1_coefficient", "plugin"))


def render(card: Card, existing: str | None = None) -> str:
    """Return the card's text; of `existing`, the one that is there, hand-written parts stay.

    Raises ConfigError for values that no card can show, and for front matter that is no YAML.
    """
    for entry in card.entries:
        require_readable(entry)
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(md=escape, code=code, cell=cell)
    here = resources.files("sae_gated_plugin.publish")
    template = here.joinpath("model_card.md.jinja").read_text("utf-8")
    entries = sorted(card.entries, key=lambda entry: entry.sae_id)
    front = _front_matter(card, entries)
    generated = environment.from_string(template).render(
        repo=card.repo,
        entries=entries,
        figures=list(card.figures.items()),
        quickstart=QUICKSTART,
        license=card.license,
        revision=card.revision,
        metrics=_shown(entries),
        config=_config,
        models=_distinct(entry.metadata.get("model_name") for entry in entries),
        datasets=_distinct(entry.metadata.get("dataset_path") for entry in entries),
        hooks=_distinct(entry.metadata.get("hook_name") for entry in entries),
        shown=min(entries, key=lambda entry: entry.architecture not in SAELENS, default=None),
        ours=[entry for entry in entries if entry.architecture not in SAELENS],
        versions=sorted(
            {
                f"{name} {version}"
                for entry in entries
                for name, version in ((entry.results or {}).get("versions") or {}).items()
            }
        ),
    )
    generated = generated.strip().replace("<!-- sae-gated", "<!- - sae-gated")  # in a name
    generated = f"{BEGIN}\n{generated}\n{END}"
    kept_front, kept = _parts(existing or "")
    before, marked, after = _split(kept)
    kept = f"{before}{generated}{after}" if marked else f"{generated}\n\n{kept}".strip("\r\n")
    return f"---\n{yaml_text({**kept_front, **front})}---\n\n{kept}\n"


def _parts(text: str) -> tuple[dict[Any, Any], str]:
    """A card's front matter, and the text below it without blank lines around it."""
    found = REGEX_YAML_BLOCK.search(text)
    try:
        front = yaml.safe_load(found[2]) if found else None
    except Exception as error:  # PyYAML has no one class for it
        reason = first_line(error)
        sentence = f"The front matter of {CARD_FILE} is not valid YAML: {reason}. Mend it first."
        raise ConfigError(sentence) from None
    if found and (front is None or isinstance(front, dict)):
        return cast("dict[Any, Any]", front) or {}, text[found.end() :].strip("\r\n")
    return {}, text.strip("\r\n")  # a text between two lines, which only looks like it


def _split(text: str) -> tuple[str, str, str]:
    """What is before, between and after the marks; all of it before where they are not there."""
    end = text.find(END, text.find(BEGIN)) if BEGIN in text else -1
    if end < 0:
        return text, "", ""
    begin, end = text.rindex(BEGIN, 0, end), end + len(END)
    return text[:begin], text[begin:end], text[end:]


def _shown(entries: Sequence[Entry]) -> tuple[Measure, ...]:
    probed = (probe for probe in PROBES if any((e.results or {}).get(probe.key) for e in entries))
    return (*METRICS, *probed)


def _front_matter(card: Card, entries: Sequence[Entry]) -> dict[str, Any]:
    def known(name: str) -> list[str] | None:  # the Hub refuses the name of a folder
        names = _distinct(entry.metadata.get(name) for entry in entries)
        return [name for name in names if HUB_ID.fullmatch(name)] or None

    measured = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=entry.dataset,
            dataset_name=entry.dataset,
            dataset_split=str(entry.results.get("split")),
            metric_type=measure.key,
            metric_name=f"{measure.heading} ({entry.sae_id})",
            metric_value=entry.results[measure.key],
        )
        for entry in entries
        if entry.results
        for measure in _shown(entries)
        if entry.results.get(measure.key) is not None
    ]
    data = ModelCardData(
        library_name="saelens",
        license=card.license,
        base_model=known("model_name"),
        datasets=known("dataset_path"),
        tags=sorted({"saelens", "sparse-autoencoder", *(entry.trained_as for entry in entries)}),
        eval_results=measured or None,
        model_name=card.repo.split("/")[-1] if measured else None,
    )
    return data.to_dict()


def _config(entry: Entry) -> str:
    """The exact configuration, as YAML inside a fence that is longer than any in it."""
    text = yaml_text(dict(entry.run or entry.config))
    fence = "`" * max(3, 1 + _longest_ticks(text))
    return f"{fence}yaml\n{text.strip()}\n{fence}"


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def escape(text: Any) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    line = re.sub(r"([\\`*_\[\]#|~])", r"\\\1", " ".join(str(text).split()))
    return html.escape(line, quote=False)


def code(text: Any) -> str:
    """Text as inline code, whatever it holds."""
    line = " ".join(str(text).split()) or " "
    fence = "`" * (1 + _longest_ticks(line))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)


def cell(text: Any) -> str:
    """Inline code for a table, where a bar ends the cell even there."""
    return code(text).replace("|", "\\|")
