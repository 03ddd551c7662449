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
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from ..config.check import convert_value, require_range
from ..config.yaml import yaml_text
from ..errors import ConfigError, first_line

CARD_FILE = "README.md"
BEGIN = "<!-- sae-gated: from here to the end mark, every push writes this anew -->"
END = "<!-- sae-gated: end -->"

#: Metrics of the table and of the model index: key of results.json, heading, format.
METRICS = (
    ("l0", "L0", "{:.1f}"),
    ("fvu", "FVU", "{:.4f}"),
    ("gamma", "γ", "{:.4f}"),
    ("loss_recovered", "loss recovered", "{:.4f}"),
    ("nats_lost", "nats lost", "{:.4f}"),
    ("dead_share", "dead share", "{:.4f}"),
)

_HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9_][\w.-]*", re.ASCII | re.IGNORECASE)


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
        """SAELens's metadata."""
        return self.config.get("metadata") or {}

    @property
    def trained_as(self) -> str:
        """The architecture it was trained as."""
        return str(self.metadata.get("training_architecture") or self.config.get("architecture"))


@dataclass(frozen=True)
class Card:
    """What a card is made from. figures: paths within the repository. license: an SPDX name."""

    repo: str
    entries: Sequence[Entry]
    figures: Sequence[str] = field(default_factory=tuple)
    license: str | None = None


#: What a card reads of an SAE's files: any of it may be missing or null.
_CONFIG: dict[str, Any] = {
    **dict.fromkeys(("d_in", "d_sae", "d_hidden"), int | None),
    "architecture": str | None,
    "metadata": dict[str, Any] | None,
}
_METADATA: dict[str, Any] = {
    **dict.fromkeys(("model_name", "dataset_path", "hook_name"), str | None),
    "training_architecture": str | None,
    "training_architecture_details": dict[str, Any] | None,
    "l1_coefficient_reached": float | None,
}
_DETAILS: dict[str, Any] = {
    **dict.fromkeys(("target_l0", "l1_coefficient", "decoder_coherence"), float | None),
    "decoder_coherence_cap": float | None,
    "sparsity_loss": str | None,
}
_RESULTS: dict[str, Any] = {
    **dict.fromkeys((key for key, _, _ in METRICS), float | None),
    **dict.fromkeys((f"{key}_ci" for key, _, _ in METRICS), tuple[float, float] | None),
    **dict.fromkeys(("tokens", "training_tokens"), int | None),
    **dict.fromkeys(("dataset", "split"), str | None),
    **dict.fromkeys(("undefined", "versions"), dict[str, Any] | None),
    "l1_coefficient": float | None,
}


def require_readable(entry: Entry) -> None:
    """Raise ConfigError where an SAE's files hold something else than a card reads there."""
    for file, values in (("run", entry.run or {}), ("results", entry.results or {})):
        convert_value(dict[str, Any], values, f"The {file} of '{entry.sae_id}'")

    def require(file: str, hints: dict[str, Any], values: Mapping[str, Any] | None) -> None:
        for name in hints.keys() & (values or {}).keys():
            where = f"'{name}' in the {file} of '{entry.sae_id}'"
            value = convert_value(hints[name], (values or {})[name], where)
            require_range(name, value, where)

    require("configuration", _CONFIG, entry.config)
    require("metadata", _METADATA, entry.metadata)
    require("training details", _DETAILS, entry.metadata.get("training_architecture_details"))
    require("results", _RESULTS, entry.results)


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
    generated = environment.from_string(template).render(
        repo=card.repo,
        entries=entries,
        first=entries[0],
        figures=sorted(card.figures),
        license=card.license,
        metrics=METRICS,
        value=_value,
        missing=_missing,
        describe=describe,
        penalty=_penalty,
        config=_config,
        models=_distinct(entry.metadata.get("model_name") for entry in entries),
        datasets=_distinct(entry.metadata.get("dataset_path") for entry in entries),
        hooks=_distinct(entry.metadata.get("hook_name") for entry in entries),
        plain=[e for e in entries if e.config.get("architecture") in PLAIN],
        ours=[e for e in entries if e.config.get("architecture") not in PLAIN],
        versions=_versions(entries),
    )
    generated = generated.strip().replace("<!-- sae-gated", "<!- - sae-gated")  # in a name
    generated = f"{BEGIN}\n{generated}\n{END}"
    front, kept = _parts(existing or "")
    before, marked, after = _split(kept)
    kept = f"{before}{generated}{after}" if marked else f"{generated}\n\n{kept}".strip("\r\n")
    front.update(_front_matter(card, entries))
    header = yaml_text(front)
    return f"---\n{header}---\n\n{kept}\n"


#: Architectures that SAELens has without this plugin.
PLAIN = ("standard", "gated", "jumprelu", "topk", "batchtopk")


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


def _front_matter(card: Card, entries: Sequence[Entry]) -> dict[str, Any]:
    models = _distinct(entry.metadata.get("model_name") for entry in entries)
    datasets = _distinct(entry.metadata.get("dataset_path") for entry in entries)
    data = ModelCardData(
        library_name="saelens",
        license=card.license,
        # The Hub wants names it knows; a folder's name would be an error there.
        base_model=[m for m in models if _HUB_ID.fullmatch(m)] or None,
        datasets=[d for d in datasets if _HUB_ID.fullmatch(d)] or None,
        tags=sorted({"saelens", "sparse-autoencoder", *(entry.trained_as for entry in entries)}),
    )
    front = data.to_dict()
    measured = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=_dataset(entry),
            dataset_name=_dataset(entry),
            dataset_split=str(entry.results.get("split")),
            metric_type=key,
            metric_name=f"{heading} ({entry.sae_id})",
            metric_value=entry.results[key],
        )
        for entry in entries
        if entry.results
        for key, heading, _ in METRICS
        if entry.results.get(key) is not None
    ]
    if measured:
        front["model-index"] = eval_results_to_model_index(card.repo.split("/")[-1], measured)
    return front


def _dataset(entry: Entry) -> str:
    results = entry.results or {}
    return str(results.get("dataset") or entry.metadata.get("dataset_path") or "unknown")


def _value(entry: Entry, key: str, form: str) -> str:
    """A cell of the table: the number, with its interval, or that there is none."""
    value = (entry.results or {}).get(key)
    if value is None:
        return "not measured" if entry.results is None else "none"
    interval = (entry.results or {}).get(f"{key}_ci")
    text = form.format(value)
    return f"{text} [{', '.join(form.format(end) for end in interval)}]" if interval else text


def _missing(entries: Sequence[Entry]) -> list[str]:
    """Sentences on what is not known."""
    said = [
        f"{code(entry.sae_id)} has not been measured." for entry in entries if entry.results is None
    ]
    for entry in entries:
        for name, reason in ((entry.results or {}).get("undefined") or {}).items():
            said.append(f"{code(entry.sae_id)} has no {escape(name)}: {escape(reason)}")
    return said


def describe(entry: Entry) -> str:
    """The architecture and its flags, in words."""
    details = entry.metadata.get("training_architecture_details") or {}
    name = entry.trained_as
    said = {
        "gated": "Gated SAE (Rajamanoharan et al. 2024)",
        "prolu": "ProLU SAE (Taggart 2024)",
        "relu": "ReLU SAE",
        "standard": "SAELens's standard SAE",
        "mlp_encoder": "Gated SAE with a two-layer encoder of "
        f"{entry.config.get('d_hidden')} hidden units",
        "expanded": "SAE with expanded reconstruction",
        "rescale_shift": "Rescaled and shifted ReLU SAE",
        "sae_lens_gated": "SAELens's built-in Gated SAE",
    }.get(name, f"{name} SAE")
    flags = [
        words
        for key, value, words in (
            ("aux_decoder", "frozen", "frozen auxiliary decoder"),
            ("aux_decoder", "trainable", "trainable auxiliary decoder"),
            ("decoder", "unit_norm", "decoder rows of norm 1"),
            ("decoder", "norm_weighted", "free decoder norms that weight the penalty"),
            ("learn_r_mag", False, "no learned rescaling"),
            ("tie_encoders", False, "two encoders"),
            ("tie_b_mag", True, "b_mag tied to the gate's bias"),
            ("gradient", "ste", "straight-through gradient"),
            ("gradient", "relu", "ReLU gradient"),
            ("hybrid", True, "plain ReLU where the bias is positive"),
            ("dead_latents", "resample", "dead latents resampled"),
            ("dead_latents", "auxk", "auxk loss on dead latents"),
        )
        if details.get(key) == value
    ]
    if entry.config.get("residual") is False:
        flags.append("no skip around the hidden layer")
    if details.get("decoder_coherence"):
        cap = details.get("decoder_coherence_cap")
        flags.append(f"cosine similarity of decoder rows above {cap} penalised")
    loss = details.get("sparsity_loss")
    if loss not in (None, "l1"):
        flags.append(f"{loss} penalty")
    if entry.config.get("architecture") not in (name, None):
        flags.append(f"saved in the form of SAELens's {entry.config.get('architecture')}")
    return ", ".join([said, *flags])


def _penalty(entry: Entry) -> str:
    """λ in SAELens's units and the paper's, and the target where there was one."""
    results = entry.results or {}
    details = entry.metadata.get("training_architecture_details") or {}
    reached = entry.metadata.get("l1_coefficient_reached")
    coefficient = results.get("l1_coefficient") or reached or details.get("l1_coefficient")
    d_in = entry.config.get("d_in")
    if not isinstance(coefficient, int | float) or not isinstance(d_in, int):
        return "no λ"
    text = f"λ = {coefficient:.4g} in SAELens's units, {coefficient / d_in:.4g} in the paper's"
    target = details.get("target_l0")
    return f"{text}, reached by a controller for L0 = {target:g}" if target else text


def _config(entry: Entry) -> str:
    """The exact configuration, as YAML inside a fence that is longer than any in it."""
    text = yaml_text(dict(entry.run or entry.config))
    fence = "`" * max(3, 1 + _longest_ticks(text))
    return f"{fence}yaml\n{text.strip()}\n{fence}"


def _versions(entries: Sequence[Entry]) -> list[str]:
    found = {
        f"{name} {version}"
        for entry in entries
        for name, version in ((entry.results or {}).get("versions") or {}).items()
    }
    return sorted(found)


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
