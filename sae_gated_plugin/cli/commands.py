"""The command line: parses, calls, prints. Errors are a sentence and an exit code, no traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import traceback
from collections.abc import Generator
from functools import partialmethod
from typing import Annotated, Any

import torch
import tqdm
import typer
from rich.console import Console

from .. import __version__
from ..config.run import load_config
from ..errors import ConfigError, Interrupted, SaeGatedError, disk_full
from ..measure import encoder_gap
from ..measure import evaluate as evaluation
from ..measure.evaluate import DEFAULT_TOKENS
from ..plugins.bridge import registry
from ..publish import convert, hub
from ..report import page as report
from ..sweeps.grid import load_sweep
from ..sweeps.sweep import run_sweep
from ..toy.data import load_toy
from ..toy.experiment import run_toy
from ..training import checkpoints
from ..training import run as training
from .tables import (
    export_lines,
    gap_table,
    plugins_table,
    push_lines,
    report_lines,
    results_table,
    saes_table,
    sweep_table,
    toy_table,
)

app = typer.Typer(
    name="sae-gated",
    help="Train, measure and inspect Gated and ProLU sparse autoencoders in SAELens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print nothing but JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Output = Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder of the run.")]
Trust = Annotated[
    bool, typer.Option(help="Load the model with any option that the SAE's metadata asks for.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. sae.l1_coefficient=3")
]


@app.command()
def quickstart(
    overrides: Overrides = None, output: Output = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Train and measure a Gated SAE on the packaged model and text; needs no network."""
    with _reporting(as_json, debug) as report:
        report(training.quickstart(overrides or [], output), results_table)


@app.command()
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
    ] = checkpoints.KEPT,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an SAE as a YAML file says, and measure it on held-out text; or continue a run."""
    with _reporting(as_json, debug) as report:
        options: Any = {"on_divergence": on_divergence, "keep_checkpoints": keep_checkpoints}
        if resume is not None:
            given = [*filter(None, (config, output)), *(overrides or [])]
            if given:
                raise ConfigError(
                    f"--resume continues a run as it was begun; leave out {', '.join(given)}."
                )
            results = training.resume(resume, **options)
        elif config is None:
            raise ConfigError("Give a CONFIG.yaml to train, or --resume RUN to continue.")
        else:
            loaded = load_config(config, overrides or [])
            results = training.train(loaded, output, **options)
        report(results, results_table)


@app.command()
def sweep(
    config: Annotated[
        str, typer.Argument(metavar="SWEEP.yaml", help="A run's fields and `sweep`.")
    ],
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the sweep.")] = "sweep",
    engine: Annotated[
        str, typer.Option(help="local: one shared stream; ray: a cluster.")
    ] = "local",
    only: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="This curve alone.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train and measure a grid of SAEs; started again, it does what is missing."""
    with _reporting(as_json, debug) as show:
        results = run_sweep(load_sweep(config, overrides or []), output, engine, only or [])
        show(results, functools.partial(sweep_table, output))


@app.command("toy")
def train_toy(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml", help="The data, and SAEs to train on it.")
    ],
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="New folder.")] = "toy",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train SAEs on toy data whose true features are known, and see which are found."""
    with _reporting(as_json, debug) as show:
        show(run_toy(load_toy(config, overrides or []), output), toy_table)


@app.command("report")
def write_report(
    results: Annotated[list[str], typer.Argument(help="results.json files, runs, sweeps.")],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the page.")] = "report",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw results as one HTML page: curves over L0, shrinkage, dead latents, the table."""
    with _reporting(as_json, debug) as show:
        show(report.write_report(results, output), report_lines)


@app.command()
def push(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the Hub.")],
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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish trained SAEs on the Hugging Face Hub, in one commit, with a card."""
    with _reporting(as_json, debug) as show:
        done = hub.push(
            runs,
            repo,
            names=name or (),
            form=form,
            private=private,
            revision=revision,
            create_pr=create_pr,
            dry_run=dry_run,
            base_model=base_model,
            dataset=dataset,
            license=license,
            unmeasured=unmeasured,
        )
        show(done, push_lines)


@app.command("list")
def list_saes(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the SAEs of a repository on the Hugging Face Hub."""
    with _reporting(as_json, debug) as show:
        show(hub.list_saes(repo, revision), saes_table)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="New folder.")],
    form: Annotated[str, typer.Option(help="jumprelu or native.")] = "jumprelu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an SAE in a form that plain SAELens loads, checked on activations."""
    with _reporting(as_json, debug) as show:
        show(convert.export(run, output, form), export_lines)


@app.command("eval")
def evaluate(
    path: Annotated[str, typer.Argument(help="Folder of a run, or a release with --sae-id.")],
    sae_id: Annotated[str | None, typer.Option(help="PATH is a SAELens release.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to read.")] = DEFAULT_TOKENS,
    dataset: Annotated[str | None, typer.Option(help="Default: the training's.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: validation, test or train.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to load instead.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    trust_model_options: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure any SAE that SAELens can load."""
    with _reporting(as_json, debug) as report:
        results = evaluation.evaluate(
            path,
            sae_id=sae_id,
            model_name=model,
            dataset=dataset,
            split=split,
            tokens=tokens,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            trust_model_options=trust_model_options,
        )
        report(results, results_table)


@app.command("encoder-gap")
def measure_encoder_gap(
    run: Annotated[str, typer.Argument(help="Folder of a run, or a release with --sae-id.")],
    sae_id: Annotated[str | None, typer.Option(help="RUN is a SAELens release.")] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of text to read.")
    ] = encoder_gap.DEFAULT_TOKENS,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Default: encoder_gap.json in RUN.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    trust_model_options: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how much of an SAE's error is its encoder's, and how much its dictionary's."""
    with _reporting(as_json, debug) as show:
        measured = encoder_gap.encoder_gap(
            run,
            sae_id=sae_id,
            tokens=tokens,
            output=output,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            trust_model_options=trust_model_options,
        )
        show(measured, gap_table)


@app.command("plugins")
def list_plugins(as_json: Json = False, debug: Debug = False) -> None:
    """List what plugs into SAELens here: distribution, version, hooks, status."""
    with _reporting(as_json, debug) as report:
        report([dataclasses.asdict(info) for info in registry().plugins], plugins_table)


@app.callback(invoke_without_command=True)
def _options(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"sae-gated-plugin {__version__}")
        raise typer.Exit


@contextlib.contextmanager
def _reporting(as_json: bool, debug: bool) -> Generator[Any]:
    """Yield `report(value, table)`; turn errors into sentences on stderr and exit codes.

    2: a SaeGatedError, something the user can mend. 1: anything else. 130: interrupted, 143: by
    SIGTERM.
    With `as_json`, whatever libraries print goes to stderr and stdout gets the JSON alone.
    """
    stdout = sys.stdout

    def report(value: Any, table: Any) -> None:
        if as_json:
            print(json.dumps(value, indent=2, allow_nan=False), file=stdout)
        else:
            console = Console(file=stdout, highlight=False, markup=False)
            for part in table(value):
                console.print(part, soft_wrap=isinstance(part, str))  # no breaks within a path

    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else stdout):
            yield report
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
    typer.echo(sentence, err=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line; the script `sae-gated` calls this."""
    if not sys.stderr.isatty():
        # SAELens's bars are tqdm's, which reads TQDM_DISABLE at import, long before this line.
        tqdm.tqdm.__init__ = partialmethod(tqdm.tqdm.__init__, disable=True)  # type: ignore
    app()


if __name__ == "__main__":
    main()
