"""The command line: parses, calls, prints. Errors are a sentence and an exit code, no traceback.

What a command needs it imports when it runs: PyTorch and SAELens take seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Generator
from functools import partialmethod
from typing import Annotated, Any

import tqdm
import typer
from rich.console import Console

from .. import __version__
from ..distributed import torchrun
from ..errors import ConfigError, Interrupted, SaeGatedError, disk_full
from . import tables

app = typer.Typer(
    name="sae-gated",
    help="Train, measure and inspect Gated and ProLU sparse autoencoders in SAELens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: What a command returns: a value for --json, and what makes it a table for people.
Shown = tuple[Any, Callable[[Any], list[Any]]]

Json = Annotated[bool, typer.Option("--json", help="Print nothing but JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Output = Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. sae.l1_coefficient=3")
]
Source = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a run, or a release with --sae-id.")
]
SaeId = Annotated[str | None, typer.Option(help="RUN is a SAELens release.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="LABEL", help="This curve alone.")
]
FusedAdam = Annotated[
    bool | None,
    typer.Option(
        "--fused-adam/--no-fused-adam",
        help="PyTorch's fused Adam. Default: on CUDA; what goes on keeps what it began with.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool, typer.Option(help="Load the model with any option that the SAE's metadata asks for.")
]
Repo = Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the Hub.")]


def _command(name: str | None = None) -> Callable[[Callable[..., Shown]], Callable[..., None]]:
    """Make a function a command, with --json and --debug."""

    def register(function: Callable[..., Shown]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(as_json: bool, debug: bool, **options: Any) -> None:
            with _reporting(as_json, debug) as show:
                if function.__name__ != "train":
                    torchrun.require_one(function.__name__)
                show(*function(**options))

        signature = inspect.signature(function, eval_str=True)
        common = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for key, kind in (("as_json", Json), ("debug", Debug))
        ]
        parameters = [*signature.parameters.values(), *common]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore
        return app.command(name)(command)

    return register


@_command()
def quickstart(overrides: Overrides = None, output: Output = None) -> Shown:
    """Train and measure a Gated SAE on the packaged model and text; needs no network."""
    tables.say_loading()
    from ..report.page import write_report
    from ..training.run import quickstart

    results = quickstart(overrides or [], output)
    report = write_report([results["path"]], f"{results['path']}/report")
    return results, functools.partial(tables.quickstart_table, report["page"])


@_command()
def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="SAELens's own fields.")
    ] = None,
    overrides: Overrides = None,
    output: Output = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue this run, exactly.")
    ] = None,
    on_divergence: Annotated[
        str, typer.Option(help="stop; skip: leave out batches with NaN or infinite numbers.")
    ] = "stop",
    keep_checkpoints: Annotated[
        int, typer.Option(min=0, help="How many of the newest; 0 for all.")
    ] = 2,
    fused_adam: FusedAdam = None,
) -> Shown:
    """Train an SAE as a YAML file says, and measure it on held-out text; or continue a run."""
    options: Any = {
        "on_divergence": on_divergence,
        "keep_checkpoints": keep_checkpoints,
        "fused_adam": fused_adam,
    }
    given = [*filter(None, (config, output)), *(overrides or [])]
    if resume is not None and given:
        raise ConfigError(
            f"--resume continues a run as it was begun; leave out {', '.join(given)}."
        )
    if resume is None and config is None:
        raise ConfigError("Give a CONFIG.yaml to train, or --resume RUN to continue.")
    tables.say_loading()
    from ..config.run import load_config
    from ..training import run

    if config is None:
        results = run.resume(str(resume), **options)
    else:
        results = run.train(load_config(config, overrides or []), output, **options)
    return results, tables.run_table


@_command()
def fits(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="As for train.")],
    overrides: Overrides = None,
    memory: Annotated[float, typer.Option(min=0.1, help="Of each GPU, in GB.")] = 80.0,
) -> Shown:
    """Say how many GPUs of some size an SAE needs: memory of each process, bytes per step."""
    from ..config.run import load_config
    from ..training.needs import needs

    rows = needs(load_config(config, overrides or []))
    return rows, functools.partial(tables.needs_table, memory)


@_command()
def sweep(
    config: Annotated[
        str, typer.Argument(metavar="SWEEP.yaml", help="A run's fields and `sweep`.")
    ],
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the sweep.")] = "sweep",
    engine: Annotated[
        str, typer.Option(help="local: one shared stream; ray: a cluster.")
    ] = "local",
    only: Only = None,
    fused_adam: FusedAdam = None,
) -> Shown:
    """Train and measure a grid of SAEs; started again, it does what is missing."""
    tables.say_loading()
    from ..sweeps.grid import load_sweep
    from ..sweeps.sweep import run_sweep

    results = run_sweep(load_sweep(config, overrides or []), output, engine, only or [], fused_adam)
    return results, functools.partial(tables.sweep_table, output)


@_command()
def toy(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml", help="The data, and SAEs to train on it.")
    ],
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="New folder.")] = "toy",
) -> Shown:
    """Train SAEs on toy data whose true features are known: `synth` by its first name."""
    return _synthetic(config, overrides, output)


@_command()
def synth(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml", help="The data, and SAEs to train on it.")
    ],
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the SAEs.")] = "synth",
    only: Only = None,
    fused_adam: FusedAdam = None,
) -> Shown:
    """Train SAEs on synthetic data, see which true features they find; again: what is missing."""
    return _synthetic(config, overrides, output, only=only or [], fused_adam=fused_adam)


def _synthetic(config: str, overrides: list[str] | None, output: str, **options: Any) -> Shown:
    from ..synthetic.config import load_toy
    from ..synthetic.experiment import run_toy

    return run_toy(load_toy(config, overrides or []), output, **options), tables.toy_table


@_command()
def report(
    results: Annotated[list[str], typer.Argument(help="results.json files, runs, sweeps.")],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the page.")] = "report",
) -> Shown:
    """Draw results as one HTML page: curves over L0, shrinkage, dead latents, the table."""
    from ..report.page import write_report

    return write_report(results, output), tables.report_lines


@_command()
def push(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    repo: Repo,
    name: Annotated[
        list[str] | None, typer.Option(help="Its name there, once per run; default the folder's.")
    ] = None,
    form: Annotated[str | None, typer.Option(help="native or jumprelu; default by kind.")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="As a pull request.")] = False,
    dry_run: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write it here, send nothing.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="The model's name on the Hub.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset's name on the Hub.")] = None,
    license: Annotated[str | None, typer.Option(help="SPDX name, e.g. mit.")] = None,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Runs without results, too.")
    ] = False,
) -> Shown:
    """Publish trained SAEs on the Hugging Face Hub, in one commit, with a card."""
    options = locals()  # each is push's parameter of that name
    options["names"] = options.pop("name") or ()
    from ..publish.hub import push

    return push(**options), tables.push_lines


@_command("list")
def list_repository(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    revision: Revision = None,
) -> Shown:
    """List the SAEs of a repository on the Hugging Face Hub."""
    from ..publish.hub import list_saes

    return list_saes(repo, revision), tables.saes_table


@_command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="New folder.")],
    form: Annotated[str, typer.Option(help="jumprelu or native.")] = "jumprelu",
) -> Shown:
    """Write an SAE in a form that plain SAELens loads, checked on activations."""
    from ..publish.convert import export

    return export(run, output, form), tables.export_lines


@_command("eval")
def evaluate(
    run: Source,
    sae_id: SaeId = None,
    revision: Revision = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to read.")] = 100_000,
    dataset: Annotated[str | None, typer.Option(help="Default: the training's.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: validation, test or train.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to load instead.")] = None,
    device: Device = None,
    coherence: Annotated[bool, typer.Option(help="Compare decoder rows with each other.")] = True,
    prefixes: Annotated[
        bool, typer.Option("--prefixes", help="Each Matryoshka prefix by itself, too.")
    ] = False,
    trust_model_options: Trust = False,
) -> Shown:
    """Measure any SAE that SAELens can load."""
    from ..measure.evaluate import evaluate

    results = evaluate(
        run,
        sae_id=sae_id,
        revision=revision,
        model_name=model,
        dataset=dataset,
        split=split,
        tokens=tokens,
        device=device or _default_device(),
        coherence=coherence,
        prefixes=prefixes,
        trust_model_options=trust_model_options,
    )
    return results, tables.results_table


@_command("encoder-gap")
def measure_encoder_gap(
    run: Source,
    sae_id: SaeId = None,
    revision: Revision = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to read.")] = 10_000,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Default: encoder_gap.json in RUN.")
    ] = None,
    device: Device = None,
    trust_model_options: Trust = False,
) -> Shown:
    """Measure how much of an SAE's error is its encoder's, and how much its dictionary's."""
    from ..measure.encoder_gap import encoder_gap

    measured = encoder_gap(
        run,
        sae_id=sae_id,
        revision=revision,
        output=output,
        tokens=tokens,
        device=device or _default_device(),
        trust_model_options=trust_model_options,
    )
    return measured, tables.gap_table


@_command()
def probe(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    dataset: Annotated[
        list[str] | None, typer.Option(help="A data set of sae-probes; may be given again.")
    ] = None,
    n_datasets: Annotated[int, typer.Option(min=1, help="Where none is named.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="Splits per data set.")] = 3,
    model: Annotated[str | None, typer.Option(help="Model to load instead.")] = None,
    device: Device = None,
    trust_model_options: Trust = False,
) -> Shown:
    """Classify real texts by a few latents each: sparse probing with sae-probes."""
    from ..measure.probe import probe

    measured = probe(
        runs,
        dataset or (),
        n_datasets=n_datasets,
        seeds=seeds,
        model_name=model,
        device=device or _default_device(),
        trust_model_options=trust_model_options,
    )
    return measured, tables.probes_table


@_command()
def plugins() -> Shown:
    """List what plugs into SAELens here: distribution, version, hooks, status."""
    from ..plugins.bridge import registry

    return [dataclasses.asdict(info) for info in registry().plugins], tables.plugins_table


@app.callback(invoke_without_command=True)
def _options(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"sae-gated-plugin {__version__}")
        raise typer.Exit


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _reporting(as_json: bool, debug: bool) -> Generator[Callable[[Any, Any], None]]:
    """Yield `show(value, table)`; turn errors into sentences on stderr and exit codes.

    2: a SaeGatedError, something the user can mend. 1: anything else. 130: interrupted, 143: by
    SIGTERM.
    With `as_json`, whatever libraries print goes to stderr and stdout gets the JSON alone.
    """
    stdout = sys.stdout

    def show(value: Any, table: Callable[[Any], list[Any]]) -> None:
        if torchrun.rank():
            return
        if as_json:
            print(json.dumps(value, indent=2, allow_nan=False), file=stdout)
        else:
            console = Console(file=stdout, highlight=False, markup=False)
            for part in table(value):
                console.print(part, soft_wrap=isinstance(part, str))  # no breaks within a path

    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else stdout):
            yield show
        return
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        sentence = f"Interrupted. {error}".strip()
        code = error.exit_code if isinstance(error, Interrupted) else 130
    except SaeGatedError as error:
        sentence, code = f"Error: {error}", 2
        if debug:
            traceback.print_exc()
    except Exception as error:
        sentence, code = f"Unexpected {type(error).__name__}: {error}", 1
        if disk_full(error):
            sentence, code = f"Error: The disk is full: {error}. Make room, then try again.", 2
        if debug:
            traceback.print_exc()
        elif code == 1:
            sentence += "\n--debug shows where it happened."
    for bar in list(getattr(tqdm.tqdm, "_instances", ())):
        bar.close()  # a bar that the error left open has no line's end after it
    if torchrun.speaks():
        typer.echo(sentence, err=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line; the script `sae-gated` calls this."""
    if not sys.stderr.isatty() or torchrun.rank():
        # SAELens's bars are tqdm's, which reads TQDM_DISABLE at import, long before this line.
        tqdm.tqdm.__init__ = partialmethod(tqdm.tqdm.__init__, disable=True)  # type: ignore
    app()


if __name__ == "__main__":
    main()
