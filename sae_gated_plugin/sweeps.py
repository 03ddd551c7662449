"""Many runs: a grid over architectures, λ or target L0, and seeds.

A sweep's file is a run's configuration with a section more:

    sae: {d_in: 576, d_sae: 2304}                 what the points share
    sweep:
      seeds: [0, 1]
      eval_tokens: 262_144
      curves:
        - {label: gated, architecture: gated, l1_coefficient: [4, 8, 16]}
        - {label: topk, architecture: topk, k: [16, 32, 64]}

A list stands for alternatives; all combinations are points. A curve may have `seeds` of its own. On
one machine points that differ in nothing but `sae` and seed are trained side by side on one stream
of activations (SAELens's MultiSAETrainer), so N SAEs cost one pass of the language model;
`engine="ray"` makes each point a task on a Ray cluster instead.

The folder: `sweep.yaml`; `points/NAME/`, each like a run's folder, or with a `failed.json`;
`streams/`, checkpoints of what is under way. Starting the same sweep again does what is missing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import math
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors import SafetensorError
from safetensors.torch import save_file

from . import configuration, wandb_log
from .artifacts import load_sae, read_json, write_json
from .checkpoints import locked, obey_umask
from .configuration import Origins, RunConfig
from .dead_latents import announce_the_end
from .divergence import DivergenceGuard, nothing
from .errors import (
    ArtifactError,
    ConfigError,
    Interrupted,
    SaeGatedError,
    nearest,
    unknown_name,
)
from .evaluation import evaluate, evaluate_all, open_text
from .hook_points import HookPoint, first_line
from .signals import Signals
from .training import (
    RESULTS_FILE,
    RUN_FILE,
    evaluation_tokens,
    train,
    without_override_warning,
)

logger = logging.getLogger("sae_gated_plugin")

FAILED_FILE = "failed.json"
SWEEP_FILE = "sweep.yaml"

#: More is a slip of the hand: lists multiply.
MOST_POINTS = 10_000

#: Bytes of a folder's name on common file systems, less what is put in front of it for a while.
LONGEST_NAME = 240

#: What somebody is told who interrupts a sweep.
GO_ON = "What is done is kept; the same command goes on."

#: SAEs measured together: more share the original and the ablated pass, fewer are lost by a kill.
EVALUATED_TOGETHER = 8

#: How often a stream's state is saved, at least, so that an interrupted sweep loses little.
MIN_CHECKPOINTS = 4

_KEYS = ("seeds", "eval_tokens", "curves")
_NOT_SHARED = ("sae", "seed", "output_path")
_NOT_IN_STREAMS = ("use_cached_activations", "from_pretrained_path", "compile_sae")


@dataclass(frozen=True)
class Point:
    """One SAE of a sweep: its folder's name, its curve's label, what was varied, its run."""

    name: str
    label: str
    seed: int
    settings: dict[str, Any]
    config: RunConfig

    def about(self) -> dict[str, Any]:
        """What a report wants to know of it beside its results."""
        return {"label": self.label, "seed": self.seed, "settings": self.settings}


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. eval_tokens: held-out tokens of text per SAE, None for a run's own."""

    mapping: dict[str, Any]
    points: list[Point]
    eval_tokens: int | None


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep, apply the overrides to what its points share, check every point.

    Raises ConfigError for an empty sweep, an unknown key, a point that is no valid run, two points
    that are the same.
    """
    mapping = (
        copy.deepcopy(dict(source))
        if isinstance(source, Mapping)
        else configuration.read_yaml(source)
    )
    whole = copy.deepcopy(mapping)
    section = mapping.pop("sweep", None)
    if not isinstance(section, dict):
        raise ConfigError("A sweep needs a 'sweep' section with 'curves'; there is none.")
    section = cast("dict[str, Any]", section)
    configuration.section(dict(mapping), "sae", Origins("the sweep"))
    for key in section:
        if key not in _KEYS:
            raise ConfigError(f"Unknown key 'sweep.{key}'.{nearest(key, _KEYS)}")
    curves = section.get("curves") or []
    if not isinstance(curves, list) or not all(isinstance(curve, dict) for curve in curves):
        raise ConfigError("'sweep.curves' must be a list of mappings.")
    shared = _seeds(section.get("seeds", [mapping.get("seed", 0)]), "sweep.seeds")
    seeds = [
        _seeds(curve.get("seeds", shared), f"sweep.curves[{index}].seeds")
        for index, curve in enumerate(curves)
    ]
    eval_tokens = section.get("eval_tokens")
    if eval_tokens is not None and (type(eval_tokens) is not int or eval_tokens < 2):
        raise ConfigError(
            f"'sweep.eval_tokens' must be a whole number above 1, not {eval_tokens!r:.80}."
        )
    number = sum(
        math.prod(map(len, _alternatives(curve).values())) * len(own)
        for curve, own in zip(curves, seeds)
    )
    if number > MOST_POINTS:
        raise ConfigError(f"The sweep has {number:,} points; at most {MOST_POINTS:,} are allowed.")
    points = [
        point
        for curve, own in zip(curves, seeds)
        for point in _curve(curve, mapping, own, list(overrides))
    ]
    if not points:
        raise ConfigError("The sweep is empty: 'sweep.curves' and 'sweep.seeds' give no point.")
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"Two points of the sweep are the same, or have labels that differ in symbols only: "
            f"{', '.join(twice)}."
        )
    return Sweep(whole, points, eval_tokens)


def _curve(
    curve: dict[str, Any], shared: dict[str, Any], seeds: list[int], overrides: list[str]
) -> Iterator[Point]:
    """The points of one curve: all combinations of what is given as a list."""
    architecture = curve.get("architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ConfigError(f"The curve {curve!r:.200} names no 'architecture'.")
    label = require_label(curve.get("label", architecture))
    runner_fields = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)}
    alternatives = _alternatives(curve)
    if "seed" in alternatives:
        raise ConfigError(f"The curve '{label}' gives 'seed'; a curve's seeds are a list, 'seeds'.")
    varied = [name for name, several in alternatives.items() if len(several) > 1]
    for values, seed in itertools.product(itertools.product(*alternatives.values()), seeds):
        chosen = dict(zip(alternatives, values))
        mapping = copy.deepcopy(shared)
        mapping["seed"] = seed
        sae = mapping["sae"] = known_fields(mapping.get("sae") or {}, architecture)
        sae["architecture"] = architecture
        for name, value in chosen.items():
            (mapping if name in runner_fields else sae)[name] = value
        moving = {name: chosen[name] for name in varied}
        words = [label, *(f"{name}={value}" for name, value in moving.items()), f"seed{seed}"]
        name = re.sub(r"[^\w.=+-]+", "_", "-".join(words))
        if len(name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"The point '{name[:80]}…' of the sweep has too long a name for a folder; give its "
                "curve a short 'label', or vary less."
            )
        yield Point(name, label, seed, moving, configuration.load(mapping, overrides))


def require_label(label: Any) -> str:
    """Return a label. Raises ConfigError unless it is text that names something."""
    if not configuration.convert(str, label, "'label'").strip():
        raise ConfigError("A 'label' must not be empty; leave it out to use the architecture.")
    return label


def _alternatives(curve: dict[str, Any]) -> dict[str, list[Any]]:
    """What a curve's SAEs may differ in: each setting's values, one or more."""
    return {
        name: cast("list[Any]", value) if isinstance(value, list) else [value]
        for name, value in curve.items()
        if name not in ("architecture", "label", "seeds")
    }


def _seeds(value: Any, where: str) -> list[int]:
    """`value` as seeds. Raises ConfigError, naming `where`, for anything but whole numbers."""
    if not isinstance(value, list) or not all(type(seed) is int for seed in value):
        raise ConfigError(f"'{where}' must be a list of whole numbers, not {value!r:.80}.")
    return cast("list[int]", value)


def known_fields(sae: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Of the shared `sae` section what this architecture has; nobody's field is left to be found.

    `l1_warm_up_steps` may be shared by those that have it, while topk has no such field.
    """
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return dict(sae)
    every = {
        field.name for _, cls in SAE_TRAINING_CLASS_REGISTRY.values() for field in _fields(cls)
    }
    own = {field.name for field in _fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])}
    return {name: value for name, value in sae.items() if name in own or name not in every}


def _fields(config_class: Any) -> tuple[Any, ...]:
    return dataclasses.fields(config_class)


# --- running --------------------------------------------------------------------------------------


def run(
    sweep: Sweep, output: str | Path, engine: str = "local", only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Train and measure what is not there yet; return the results of all points, failed ones too.

    output: the sweep's folder. engine: "local", or "ray" for the cluster that `RAY_ADDRESS` names
    (a local one where it names none). only: labels of the curves to do this time, default all.
    A point that fails is recorded and the others go on; to try it again, delete its folder. One
    that is trained and could not be measured is measured again without that.
    Raises ConfigError for a folder that holds another sweep's points, Interrupted on SIGINT, and on
    SIGTERM while training, when everything is saved.
    """
    if engine not in ("local", "ray"):
        raise ConfigError(f"engine is '{engine}'; allowed: local, ray.")
    points = [point for point in sweep.points if not only or point.label in only]
    for label in only:
        known = list(dict.fromkeys(point.label for point in sweep.points))
        if label not in known:
            raise ConfigError(unknown_name("label", label, known))
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Output folder '{folder}' is a file.")
    for point in points:
        _require_same(point, folder)
        used = [name for name in _NOT_IN_STREAMS if getattr(point.config.runner, name)]
        if used:
            raise ConfigError(f"{', '.join(used)} cannot be used in a sweep; use 'train'.")
    for dataset in {point.config.runner.dataset_path for point in points}:
        open_text(dataset, "train")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SWEEP_FILE).write_text(configuration.to_yaml(sweep.mapping), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Output folder '{folder}' cannot be written: {error}") from error
    missing = _missing(folder, points)
    if engine == "ray":
        from .ray_engine import run_points

        with contextlib.ExitStack() as locks:
            for stream in _streams(missing):
                locks.enter_context(_to_ourselves(folder, stream))
            run_points(_missing(folder, missing), folder, sweep.eval_tokens)
    else:
        try:
            for stream in _streams(missing):
                with _to_ourselves(folder, stream):
                    _Stream(stream, folder, sweep.eval_tokens).run()
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT, GO_ON) from None
    return [{**point.about(), **(_outcome(folder, point) or {})} for point in points]


def point_folder(folder: Path, point: Point) -> Path:
    """Where a point's files are, once it is trained or has failed."""
    return folder / "points" / point.name


def _outcome(folder: Path, point: Point) -> dict[str, Any] | None:
    for name in (RESULTS_FILE, FAILED_FILE):
        path = point_folder(folder, point) / name
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def _missing(folder: Path, points: Sequence[Point]) -> list[Point]:
    """Points without results, but for those that failed before there was an SAE to measure."""
    missing: list[Point] = []
    for point in points:
        path = point_folder(folder, point)
        given_up = (path / FAILED_FILE).exists() and not is_trained(folder, point)
        if not given_up and not (path / RESULTS_FILE).exists():
            missing.append(point)
    return missing


def _require_same(point: Point, folder: Path) -> None:
    path = point_folder(folder, point) / RUN_FILE
    if not path.exists() or path.read_text(encoding="utf-8") == point.config.to_yaml():
        return
    if _values(configuration.load(path)) != _values(point.config):
        raise ConfigError(
            f"'{path.parent}' was trained with another configuration than this sweep's; nothing "
            "was changed. Choose another --output, or delete that folder to train it again."
        )


def _values(config: RunConfig) -> dict[str, Any]:
    """What a configuration says, however its YAML is written; without where its folder lies."""
    values = json.loads(json.dumps(config.runner.to_dict(), default=str))
    return {k: v for k, v in values.items() if k not in ("output_path", "checkpoint_path")}


def is_trained(folder: Path, point: Point) -> bool:
    """Whether the point's SAE is there, measured or not."""
    return (point_folder(folder, point) / SAE_WEIGHTS_FILENAME).exists()


def write_point(folder: Path, point: Point, fill: Callable[[Path], None]) -> None:
    """Create a point's folder whole or not at all; `fill(path)` writes into it.

    An SAE that is there already stays, but one without results gives way to one that has them.
    """
    target = point_folder(folder, point)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
        new = Path(temporary) / "point"
        new.mkdir()
        (new / RUN_FILE).write_text(point.config.to_yaml(), encoding="utf-8")
        fill(new)
        obey_umask(new)
        measured = (new / RESULTS_FILE).exists()
        if measured and target.exists() and not (target / RESULTS_FILE).exists():
            target.rename(Path(temporary) / "unmeasured")
        if not target.exists():  # otherwise another process was first
            new.rename(target)


def write_failure(
    folder: Path, point: Point, error: str, files: Mapping[str, bytes] | None = None
) -> None:
    """Record that a point failed; an SAE that it has stays.

    error: why, a sentence. files: what there is of the SAE, where it was trained elsewhere.
    """
    architecture = point.config.runner.sae.architecture()
    record = {**point.about(), "architecture": architecture, "error": error}

    def fill(new: Path) -> None:
        for name, content in (files or {}).items():
            (new / name).write_bytes(content)
        write_json(new / FAILED_FILE, record)

    if is_trained(folder, point):
        write_json(point_folder(folder, point) / FAILED_FILE, record)
    else:
        write_point(folder, point, fill)


def sentence(error: Exception) -> str:
    """What an error says, with its name where it is not one of ours."""
    return str(error) if isinstance(error, SaeGatedError) else first_line(error)


def _streams(points: list[Point]) -> list[list[Point]]:
    """Points by what they share: all but `sae`, seed and output."""
    streams: dict[str, list[Point]] = {}
    for point in points:
        streams.setdefault(_stream_key(point), []).append(point)
    return list(streams.values())


def _stream_key(point: Point) -> str:
    shared = {k: v for k, v in point.config.mapping.items() if k not in _NOT_SHARED}
    shared["d_in"] = point.config.runner.sae.d_in
    return sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


def _stream_name(points: Sequence[Point]) -> str:
    """Of these points: another process may be at others of the same stream."""
    names = sha256("\n".join(sorted(point.name for point in points)).encode()).hexdigest()[:12]
    return f"{_stream_key(points[0])}-{names}"


@contextlib.contextmanager
def _to_ourselves(folder: Path, points: Sequence[Point]) -> Generator[None]:
    """Keep other processes from training or measuring the same points meanwhile.

    The lock's file stays: who opened one that is then removed would hold a lock of its own.
    """
    lock = folder / "streams" / f"{_stream_name(points)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with locked(lock, f"This sweep in '{folder}'"):
        yield


class _Stream:
    """Points that one stream of activations trains side by side."""

    def __init__(self, points: list[Point], folder: Path, eval_tokens: int | None):
        self.points = {point.name: point for point in points}
        self.folder = folder
        self.checkpoints = folder / "streams" / _stream_name(points)
        self.cfg = points[0].config.runner
        self.tokens = eval_tokens or evaluation_tokens(self.cfg)
        self.model = HookPoint.load(
            self.cfg.model_name,
            self.cfg.model_class_name,
            self.cfg.hook_name,
            self.cfg.hook_head_index,
            device=self.cfg.llm_device or self.cfg.device,
            from_pretrained_kwargs=self.cfg.model_from_pretrained_kwargs,
        )
        self.model.require_width(self.cfg.sae.d_in)

    def run(self) -> None:
        """Train what has no weights yet, then measure what has no results yet."""
        missing = _missing(self.folder, list(self.points.values()))
        untrained = {point.name: point for point in missing if not is_trained(self.folder, point)}
        if untrained:
            self._train(untrained)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        trained = _missing(self.folder, missing)
        for start in range(0, len(trained), EVALUATED_TOGETHER):
            self._measure(trained[start : start + EVALUATED_TOGETHER])

    def _train(self, points: dict[str, Point]) -> None:
        saes: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for name, point in points.items():
            torch.manual_seed(point.seed)
            sae_class, _ = get_sae_training_class(point.config.runner.sae.architecture())
            with _noting(failed, name):
                saes[name] = sae_class(copy.deepcopy(point.config.runner.sae))
        if saes:
            self._train_together(points, saes, failed)
        for name, error in failed.items():
            write_failure(self.folder, points[name], error)

    def _train_together(
        self, points: dict[str, Point], saes: dict[str, Any], failed: dict[str, str]
    ) -> None:
        """Train SAEs on the stream, save each; add those that fail to `failed`."""

        def save(name: str, trainer: Any) -> None:
            with _noting(failed, name, OSError, SafetensorError, ArtifactError):  # of the disk
                self._save(points[name], trainer)

        config = _multi_config(self.cfg, {name: sae.cfg for name, sae in saes.items()})
        config.checkpoint_path = str(self.checkpoints)
        start = config.resume_from_checkpoint = self._newest_checkpoint(saes)
        torch.manual_seed(self.cfg.seed)
        try:
            with without_override_warning():
                runner = _Runner(config, save, self.model.model, saes)
            if start is not None:
                runner.take_up_failures(Path(start) / FAILED_FILE)
            runner.run()
        except (ValueError, OSError) as error:
            raise ConfigError(f"The sweep cannot be trained: {error}") from error
        if runner.signals.number:  # it came too late to stop the training
            raise Interrupted(runner.signals.number, GO_ON)
        failed.update(runner.failed)

    def _newest_checkpoint(self, names: Iterable[str]) -> str | None:
        complete = self.checkpoints.glob(f"*/{RUNNER_CFG_FILENAME}")
        usable = [
            path.parent
            for path in complete
            if all((path.parent / name / SAE_WEIGHTS_FILENAME).exists() for name in names)
        ]
        return str(max(usable, key=lambda path: int(path.name))) if usable else None

    def _save(self, point: Point, trainer: Any) -> None:
        def fill(new: Path) -> None:
            trainer.sae.save_inference_model(str(new))
            save_file({"sparsity": trainer.log_feature_sparsity}, new / SPARSITY_FILENAME)
            write_json(new / RUNNER_CFG_FILENAME, point.config.runner.to_dict())

        write_point(self.folder, point, fill)

    def _measure(self, points: list[Point]) -> None:
        """Measure points together; where that fails, one by one, and record which cannot be."""
        folders = {point.name: point_folder(self.folder, point) for point in points}
        try:
            saes = {name: load_sae(path, device=self.cfg.device) for name, path in folders.items()}
            results = evaluate_all(
                saes, model=self.model.model, tokens=self.tokens, device=self.cfg.device
            )
        except InterruptedException:
            raise
        except Exception as error:
            if len(points) > 1:
                for point in points:
                    self._measure([point])
                return
            reason = f"It is trained, but cannot be measured: {sentence(error).rstrip('.')}."
            write_failure(self.folder, points[0], f"{reason} The same command tries again.")
            return
        for point in points:
            result = {**point.about(), **results[point.name]}
            result["path"] = str(folders[point.name])
            result["training_tokens"] = self.cfg.training_tokens
            (folders[point.name] / FAILED_FILE).unlink(missing_ok=True)
            write_json(folders[point.name] / RESULTS_FILE, result)


@contextlib.contextmanager
def _noting(failed: dict[str, str], name: str, *but: type[Exception]) -> Generator[None]:
    """Note an exception as this point's failure. but: what is not this point's, and stops all."""
    try:
        yield
    except (InterruptedException, *but):
        raise
    except Exception as error:
        failed[name] = sentence(error)
        logger.warning("'%s' has failed, the others go on: %s", name, failed[name])


def _multi_config(
    cfg: LanguageModelSAERunnerConfig[Any], saes: dict[str, Any]
) -> MultiSAETrainingRunnerConfig:
    """SAELens's configuration for many SAEs, with what it has in common with that for one."""
    names = {field.name for field in dataclasses.fields(MultiSAETrainingRunnerConfig) if field.init}
    common = {
        field.name: copy.deepcopy(getattr(cfg, field.name))
        for field in dataclasses.fields(cfg)
        if field.name in names
    }
    common.update(
        output_path=None,
        checkpoint_path=None,
        n_checkpoints=max(cfg.n_checkpoints, MIN_CHECKPOINTS),
        exclude_special_tokens=cfg.exclude_special_tokens,
    )
    common["logger"].run_name = None
    return MultiSAETrainingRunnerConfig(saes=saes, hook_names=cfg.hook_name, **common)


class _Runner(MultiSAETrainingRunner):
    """SAELens's runner for many SAEs, of which one that fails does not stop the others."""

    def __init__(
        self,
        config: MultiSAETrainingRunnerConfig,
        save: Callable[[str, Any], None],
        model: Any,
        saes: dict[str, Any],
    ):
        super().__init__(config, override_model=model, override_saes=saes)
        self.failed: dict[str, str] = {}
        self.trainers: dict[str, Any] = {}
        self.signals = Signals()
        self.begun = self.saved = False
        self._save = save
        self._uploads = wandb_log.Uploads(config.logger)

    def run(self) -> dict[str, Any]:
        """Train; each SAE is saved before SAELens ends its run of wandb."""
        try:
            with wandb_log.around(self, "start the same sweep again."):
                super().run()
        finally:
            if self.cfg.logger.log_to_wandb:
                wandb_log.finish(exit_code=1)  # SAELens has done it already unless training failed
        return self.saes

    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, Any]:
        self.trainers = trainer.trainers
        for name, single in trainer.trainers.items():
            announce_the_end(single)
            DivergenceGuard(single)
            single.step = self._isolated(name, single)
            if name in self.failed:
                _silence(single)
        loop: Any = trainer
        log_sparsity = loop._maybe_log_sparsity

        def between_steps(final: bool = False) -> None:
            if self.signals.number and not final:
                self._save_for_later(trainer)
                raise Interrupted(self.signals.number, GO_ON)
            if len(self.failed) == len(self.trainers):
                raise _AllFailed
            log_sparsity(final=final)

        # What SAELens's loop calls first. SAELens itself would stop in the middle of a step, and go
        # on raising its exception, at any signal to this process, when the training is long over.
        loop._maybe_log_sparsity = between_steps
        wandb_log.shield(trainer)
        self.begun = True
        with self.signals:
            with contextlib.suppress(_AllFailed):
                trainer.fit()
            for name in trainer.trainers.keys() - self.failed.keys():
                self._save(name, trainer.trainers[name])
            self.saved = True
        return trainer.saes

    def _save_for_later(self, trainer: MultiSAETrainer) -> None:
        assert self.cfg.checkpoint_path is not None
        name = str(trainer.n_training_samples)
        saved = Path(self.cfg.checkpoint_path) / name / RUNNER_CFG_FILENAME
        if trainer.n_training_steps and not saved.exists():
            trainer.save_checkpoint(checkpoint_name=name)

    def _isolated(self, name: str, trainer: Any) -> Any:
        step, last = trainer.step, []

        def isolated(batch: torch.Tensor) -> TrainStepOutput:
            samples = trainer.n_training_samples + len(batch)
            if name not in self.failed:
                with _noting(self.failed, name):
                    last[:] = [step(batch)]
                if name in self.failed:
                    _silence(trainer)
            trainer.n_training_samples = samples  # SAELens's loop ends by this count
            return last[0] if last else nothing(batch)

        return isolated

    def take_up_failures(self, file: Path) -> None:
        """SAEs that had failed at a checkpoint do not go on from it: they have missed batches."""
        if file.exists():
            self.failed = {n: text for n, text in read_json(file).items() if n in self.saes}

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        """As in SAELens, which writes runner_cfg.json last; then older checkpoints can go."""
        if checkpoint_path is not None:
            write_json(checkpoint_path / FAILED_FILE, self.failed)
        super()._save_runner_checkpoint_files(checkpoint_path)
        if checkpoint_path is not None:
            for older in checkpoint_path.parent.iterdir():
                if older != checkpoint_path:
                    shutil.rmtree(older)
            self._uploads.send()


class _AllFailed(Exception):
    """No SAE is left to train."""


def _silence(trainer: Any) -> None:
    """Keep SAELens from logging an SAE that no longer trains."""
    trainer.optimizer.zero_grad()
    trainer.maybe_reset_sparsity = trainer.full_sparsity_window_log = dict
    trainer.build_train_step_log_dict = _no_log


def _no_log(**_: Any) -> dict[str, Any]:
    return {}


def train_alone(point: Point, eval_tokens: int | None, folder: Path) -> dict[str, Any]:
    """Train and measure one point by itself in `folder`; return its results or its failure.

    Where the folder holds the trained SAE already, it is measured only.
    """
    cfg = point.config.runner
    try:
        if not (folder / SAE_WEIGHTS_FILENAME).exists():
            results = train(point.config, folder, eval_tokens=eval_tokens)
        else:
            results = evaluate(
                folder,
                tokens=eval_tokens or evaluation_tokens(cfg),
                device=cfg.device,
                trust_model_options=True,  # they are the configuration's
            )
        return {**point.about(), **results}
    except Exception as error:
        return {"error": sentence(error)}
