"""The options that all our architectures share, and how SAELens's configuration becomes ours."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

from ...core.support import Backend
from ...errors import ConfigError
from ...plugins.about import in_words
from ...plugins.records import OURS, logger
from ...results import versions

Decoder = Literal["unit_norm", "norm_weighted"]
DeadLatents = Literal["none", "resample", "auxk"]
Control = Literal["none", "frozen_decoder", "frozen_encoder", "soft_frozen"]


T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A field of a config with its description, which SAELens's command line shows with `--help`.

    That reads no docstring below a field.
    """
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingOptions:
    """What every config of ours with a sparsity penalty has."""

    l1_coefficient: float = option(
        1.0,
        "Lambda, in SAELens's units; its standard SAE's default.",
    )
    l1_warm_up_steps: int = option(
        0,
        "Steps over which lambda rises linearly from 0; SAELens's default.",
    )
    decoder: Decoder = option(  # noqa: RUF009
        "unit_norm",
        'With "unit_norm" (both papers) decoder rows have norm 1, by projecting the gradient '
        "and renormalising after every step; decoder_init_norm is then without effect. With "
        '"norm_weighted" norms are free, and the sparsity loss weights each latent by its '
        "norm.",
    )
    sparsity_loss: str = option(
        "l1",
        "Name of a registered sparsity loss: l1 (the Gated SAE paper), sqrt_l1, lp or lp_<p>, "
        "or a plugin's.",
    )
    target_l0: float | None = option(
        None,
        "Move lambda during training until this many latents are active per token, and hold it "
        "there; l1_coefficient then is where lambda starts. None (the papers): lambda stays.",
    )
    matryoshka_widths: tuple[int, ...] = option(
        (),
        "Also reconstruct from the first so many latents, for each of these widths; every prefix "
        "adds its own loss, penalty included, so the first latents learn what is most general. "
        "d_sae is appended where it is missing, as in SAELens's matryoshka_batchtopk. Empty (both "
        "papers): one reconstruction.",
    )
    dead_latents: DeadLatents = option(  # noqa: RUF009
        "none",
        'With "resample" (both papers, after Bricken et al. 2023) dead latents start again at '
        'directions that are badly reconstructed; with "auxk" (Gao et al. 2024) they '
        "reconstruct what is left over.",
    )
    resample_steps: tuple[int, ...] = option(
        (),
        "Training steps at which to resample. The paper does it every 25,000 of 300,000 or more.",
    )
    resample_share: float | None = option(
        None,
        "Also resample whenever this share of latents is dead, at most once in "
        "resample_warm_up_steps, and not in the last two times as many steps: what has just "
        "started again fires on half of all tokens. (SAELens's own runners do not say when "
        "training ends: there it may happen at any step.)",
    )
    resample_warm_up_steps: int = option(
        1000,
        "Steps over which the learning rate comes back after resampling, by a cosine from a "
        "tenth; the paper's 1,000.",
    )
    auxk_coefficient: float = option(
        1 / 32,
        "Weight of auxk's loss; Gao et al.'s 1/32.",
    )
    decoder_coherence: float = option(
        0.0,
        "Weight of a penalty on decoder rows that are almost parallel: squared |cosine "
        "similarity| above the cap, summed over the other rows, mean over rows. Neither paper "
        "has it: 0.",
    )
    decoder_coherence_cap: float = option(
        0.3,
        "Similarities up to this one are free. 0.3 is a little above what the closest of as "
        "many random directions reach, sqrt(4 ln(d_sae) / d_in): 0.23 for 576 → 2304, 0.22 for "
        "768 → 16384.",
    )
    control: Control = option(  # noqa: RUF009
        "none",
        'A random baseline instead of an SAE (Korznikov et al. 2026): with "frozen_decoder" or '
        '"frozen_encoder" that matrix stays where it started; with "soft_frozen" decoder rows '
        "stay within a cosine similarity of 0.8 of their start.",
    )
    backend: Backend = option(  # noqa: RUF009
        "auto",
        '"auto" picks the sparse or the dense form of the same computation by the density of each '
        'batch; "sparse" and "dense" are for experiments.',
    )

    def __post_init__(self) -> None:
        self.resample_steps = tuple(self.resample_steps)  # JSON has lists
        super().__post_init__()  # type: ignore[misc]
        require_choice("decoder", self.decoder, ("unit_norm", "norm_weighted"))
        require_choice("backend", self.backend, ("auto", "dense", "sparse"))
        require_choice("dead_latents", self.dead_latents, ("none", "resample", "auxk"))
        require_choice("control", self.control, get_args(Control))
        if self.control != "none" and self.dead_latents == "resample":
            raise ConfigError(
                f"dead_latents='resample' gives latents new directions from the data, and "
                f"control='{self.control}' keeps random ones; set one of them to none."
            )
        if self.dead_latents == "resample" and not self.resample_steps and not self.resample_share:
            raise ConfigError(
                "dead_latents='resample' needs resample_steps, such as [500, 1000], or "
                "resample_share, such as 0.1."
            )
        if self.resample_share is not None and not 0 < self.resample_share < 1:
            raise ConfigError(f"resample_share is {self.resample_share}; it must lie in (0, 1).")
        if not 0 <= self.decoder_coherence < math.inf:
            raise ConfigError(
                f"decoder_coherence is {self.decoder_coherence}; it must be a number from 0 up."
            )
        if not 0 <= self.decoder_coherence_cap < 1:
            raise ConfigError(
                f"decoder_coherence_cap is {self.decoder_coherence_cap}; it bounds |cosine "
                "similarity| and must lie in [0, 1)."
            )
        d_sae: int = self.d_sae  # type: ignore[attr-defined]
        self.matryoshka_widths = _checked_widths(self.matryoshka_widths, d_sae, self.target_l0)
        if self.target_l0 is not None and not 0 < self.target_l0 < d_sae:
            raise ConfigError(
                f"target_l0 is {self.target_l0}; it must lie above 0 and below d_sae = {d_sae}."
            )

    def get_training_architecture_details(self: Any) -> dict[str, Any]:
        """As in SAELens, where it goes into every file's metadata; and who trains what."""
        details = super().get_training_architecture_details()  # type: ignore[misc]
        loss = in_words(
            self.architecture(), {"metadata": {"training_architecture_details": details}}
        )
        return {**details, "plugin": trained_with(), "loss": loss}


def _checked_widths(given: Iterable[int], d_sae: int, target_l0: float | None) -> tuple[int, ...]:
    widths = list(given)
    if not widths:
        return ()
    if max(widths) > d_sae:
        raise ConfigError(
            f"matryoshka_widths holds {max(widths)}, more than d_sae = {d_sae}: a prefix has at "
            "most all latents."
        )
    if widths[-1] != d_sae:
        widths.append(d_sae)
    if any(width >= wider for width, wider in pairwise([0, *widths])):
        raise ConfigError(
            f"matryoshka_widths is {widths}; widths must be above 0 and strictly increasing, such "
            f"as {[d_sae // 8, d_sae // 2, d_sae]}."
        )
    if len(widths) == 1:
        raise ConfigError(
            f"matryoshka_widths is {widths}, one prefix, which is the whole code; add a smaller "
            "width, or leave the option out."
        )
    if target_l0 is not None and target_l0 > widths[0]:
        raise ConfigError(
            f"target_l0 is {target_l0:g}, more than the narrowest prefix of matryoshka_widths has "
            f"latents, {widths[0]}; raise that width or lower target_l0."
        )
    return tuple(widths)


def upgrade_config(cfg: Any, config_class: type[Any]) -> Any:
    """`cfg` as a `config_class`: SAELens's own config of that architecture gets our defaults.

    Two of SAELens's runners hand the plain config to our class. The caller's object stays as it is.
    """
    if isinstance(cfg, config_class):
        return cfg
    say_upgraded(type(cfg))
    known = {field.name for field in fields(config_class)}
    return config_class(
        **{field.name: getattr(cfg, field.name) for field in fields(cfg) if field.name in known}
    )


@functools.cache
def trained_with() -> str:
    """This plugin and its version."""
    return f"{OURS} {versions()[OURS]}"


@functools.cache
def say_upgraded(plain: type[Any]) -> None:
    """Say, once in a process, that SAELens's own config now means our training."""
    logger.warning(
        "sae_lens.%s trains the %s of %s here, with that one's defaults; cfg.json says so. "
        "SAELens's own training is the architecture 'sae_lens_gated', or "
        "SAE_GATED_PLUGIN_AUTOLOAD=0.",
        plain.__name__,
        plain.architecture(),
        trained_with(),
    )


def describe_options(config: Mapping[str, Any], *own: tuple[str, Any, str]) -> str:
    """Training options of a cfg.json in words. own: an architecture's (option, value, words)."""
    details = (config.get("metadata") or {}).get("training_architecture_details") or {}
    shared = (
        ("decoder", "unit_norm", "decoder rows of norm 1"),
        ("decoder", "norm_weighted", "free decoder norms that weight the penalty"),
        ("dead_latents", "resample", "dead latents resampled"),
        ("dead_latents", "auxk", "auxk loss on dead latents"),
        ("control", "frozen_decoder", "a control with its decoder frozen at random"),
        ("control", "frozen_encoder", "a control with its encoder frozen at random"),
        ("control", "soft_frozen", "a control with its decoder held near random rows"),
    )
    said = [words for option, value, words in (*own, *shared) if details.get(option) == value]
    if details.get("matryoshka_widths"):
        said.append(f"Matryoshka prefixes of {', '.join(map(str, details['matryoshka_widths']))}")
    if details.get("decoder_coherence"):
        cap = details.get("decoder_coherence_cap")
        said.append(f"cosine similarity of decoder rows above {cap} penalised")
    if details.get("sparsity_loss") not in (None, "l1"):
        said.append(f"{details['sparsity_loss']} penalty")
    return ", ".join(said)


def require_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{field} is '{value}'; allowed: {', '.join(choices)}.")
