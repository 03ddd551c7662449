"""What the commands print: tables and lines."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from ..results import MEASURES, PROBE_KEYS, Measure, setting_of, shortcomings


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table of texts, which fold where the terminal is narrow, and of measures, which do not.

    columns: keys of MEASURES, or keys of the rows that are headings as well.
    """
    table = Table()
    for key in columns:
        if key in MEASURES:
            table.add_column(MEASURES[key].heading.replace(" ", "\n"), no_wrap=True)
        else:
            table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(key, row[key]) for key in columns))
    return table


def _cell(key: str, value: Any) -> str:
    return MEASURES[key].text(value) if key in MEASURES and value != "" else str(value)


def run_table(results: dict[str, Any]) -> list[Table | str]:
    """The results of a run, and where its files are."""
    return [*results_table(results)[:-1], f"Files: {results['path']}"]


def say_loading() -> None:
    """Importing PyTorch and SAELens takes seconds before any bar; the next line covers this one."""
    if sys.stderr.isatty():
        print("loading …", end="\r", file=sys.stderr, flush=True)


def quickstart_table(page: str, results: dict[str, Any]) -> list[Table | str]:
    """The results, where the figures are, and what to type next."""
    folder, relu = (shlex.quote(results["path"] + end) for end in ("", "-relu"))
    return [
        *run_table(results),
        f"Figures: {page}",
        "\nNext, the paper's baseline on the same data, both on one page, and a card to read:",
        f"  sae-gated quickstart sae.architecture=relu --output {relu}",
        f"  sae-gated report {folder} {relu} --output page",
        f"  sae-gated push {folder} --name quickstart --repo OWNER/NAME --dry-run card",
    ]


def results_table(results: dict[str, Any]) -> list[Table | str]:
    """Every measure in one column, plugins' metrics after ours, then what was measured where."""
    from ..plugins.bridge import registry

    shown = {key: measure for key, measure in MEASURES.items() if key in results}
    for key, value in results.items():
        if key not in (*shown, *_NOT_MEASURES) and isinstance(value, int | float):
            shown[key] = registry().measures.get(key) or Measure(key, key, key)
    table = Table("measure", "value", "95 % interval or reason")
    target = results.get("target_l0")
    said = {"l0": f"target {target:g}"} if target else {}
    said |= {**results["undefined"], **results.get("notes", {})}
    for key, measure in shown.items():
        interval = results.get(f"{key}_ci")
        note = " to ".join(map(measure.text, interval or ())) or said.get(key, "")
        table.add_row(measure.title, measure.text(results[key]), note)
    trained = results["training_tokens"]
    after = f" after {trained:,} training tokens" if trained else ""
    held_out = ", which training may have seen" if results["split"] == "train" else ""
    return [
        f"{results['architecture']} SAE, {results['d_in']} to {results['d_sae']}, at "
        f"{results['hook_name']}{after}",
        table,
        *_prefixes_table(results.get("prefixes") or []),
        f"Measured on {results['tokens']:,} tokens of split '{results['split']}'{held_out}; "
        f"{results['seconds']} s.",
        "Nothing was written; --json > FILE keeps the numbers.",
    ]


def _prefixes_table(prefixes: Sequence[Mapping[str, Any]]) -> list[Table]:
    return [_table(tuple(prefixes[0]), prefixes)] if prefixes else []


def probes_table(results: list[dict[str, Any]]) -> list[Table | str]:
    """A line per SAE, then over how many data sets and seeds."""
    table = _table(("path", *PROBE_KEYS), results)
    of = [
        f"{number} {what}" + ("s" if number != 1 else "")
        for what, number in (("data set", results[0]["datasets"]), ("seed", results[0]["seeds"]))
    ]
    return [
        table,
        f"Mean area under the curve over {' and '.join(of)}; intervals and single data sets are in "
        "each run's probes.json.",
    ]


_NOT_MEASURES = ("seconds", "target_l0", "training_tokens", "tokens", "d_in", "d_sae")


def needs_table(memory: float, rows: list[dict[str, Any]]) -> list[Table | str]:
    """One line per number of processes, and the smallest that fits. memory: of a GPU, in GB."""
    gigabytes = {name: name for name in ("latents", "common", "step", "buffer")} | {
        "together": "memory"
    }
    shown = [
        {
            "processes": row["processes"],
            **{title: f"{row[name] / 1e9:.2f}" for title, name in gigabytes.items()},
            "sent": f"{row['sent'] / 1e6:.1f}",
        }
        for row in rows
    ]
    enough = [row["processes"] for row in rows if row["memory"] <= memory * 1e9]
    answer = f"It fits in {enough[0]} × {memory:g} GB" if enough else "It fits in none of these"
    return [
        _table(list(shown[0]), shown),
        "GB in each process, and MB that it sends per step.",
        f"{answer}, beside the language model. An account of tensors, not a measurement.",
    ]


def sweep_table(output: str, results: list[dict[str, Any]]) -> list[Table | str]:
    """One line per point, why some failed, and where the files are."""
    measures = ("l0", "loss_recovered", "fvu", "gamma", "dead_share")
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    missed: list[str] = []
    for point in results:
        settings = ", ".join(f"{name}={value}" for name, value in setting_of(point).items())
        row = {**point, "settings": settings or "–"}
        where = f"{point['label']}, {settings or 'no settings'}, seed {point['seed']}"
        if "error" in point:
            row.update(dict.fromkeys(measures, ""), settings=f"{row['settings']} (failed)")
            failures.append(f"failed: {where}: {point['error']}")
        missed += [f"{where}: {sentence}" for sentence in shortcomings(point).values()]
        rows.append(row)
    table = _table(("label", "settings", "seed", *measures), rows)
    return [table, *failures, *missed, f"Files: {output}. Draw them: sae-gated report {output}"]


def toy_table(toy: dict[str, Any]) -> list[Table | str]:
    """One line per SAE, why some failed, and where the files are."""
    l0 = replace(MEASURES["l0"], format=".2f")  # of few features, about one at a time
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for sae in toy["saes"]:
        settings = ", ".join(f"{name}={value}" for name, value in sae["settings"].items())
        where = f"{sae['label']}, {settings or 'no settings'}, seed {sae['seed']}"
        if "error" in sae:
            failures.append(f"failed: {where}: {sae['error']}")
            continue
        failures += [f"{where}: {sentence}" for sentence in shortcomings(sae).values()]
        firing = (MEASURES[key].text(sae[key]) for key in ("firing_precision", "firing_recall"))
        shown = {"SAE": sae["label"], "L0": l0.text(sae["l0"]), "firing": " / ".join(firing)}
        rows.append({**sae, **shown, "settings": settings or "–"})
    where = f"Heatmaps and numbers: {toy['path']}"
    if not rows:
        return [*failures, where]
    columns = ("SAE", "L0", "fvu", "gamma", "features_found", "composites_found", "firing")
    explained = (
        "found: features with a latent of their own at a cosine above 0.95; firing: precision and "
        "recall of the matched latents."
    )
    if any(row["settings"] != "–" or row["seed"] != rows[0]["seed"] for row in rows):
        measures = ("f1", "mcc", "explained_variance", "gamma", "dead_share")
        columns = ("SAE", "settings", "seed", "L0", *measures)
        explained = f"Means over seeds: sae-gated report {toy['path']}"
    return [
        f"{toy['num_features']} true features in {toy['hidden_dim']} dimensions, "
        f"{rows[0]['true_l0']:.2f} of them at a time",
        _table(columns, rows),
        *failures,
        explained,
        where,
    ]


def gap_table(measured: dict[str, Any]) -> list[Table | str]:
    """One line per code, and how the error divides."""
    codes = {
        "encoder": "the encoder's",
        "refit": "its support, refitted",
        "pursuit": "a searched support",
    }
    rows = [{**measured[code], "code": heading} for code, heading in codes.items()]
    claim = "How the error divides is not defined here: FVU has no value, or is 0."
    if measured["shares"]:
        parts = ", ".join(f"{name} {share:.1%}" for name, share in measured["shares"].items())
        claim = f"Of the encoder's FVU: {parts}."
    return [
        _table(("code", "l0", "fvu", "gamma", "loss_recovered"), rows),
        claim,
        f"Measured on {measured['tokens']:,} tokens; {measured['seconds']} s.",
    ]


def saes_table(saes: list[dict[str, Any]]) -> list[Table | str]:
    """One line per SAE of a repository."""
    rows = [
        {
            **sae,
            "SAE": sae["sae_id"],
            "hook point": sae["hook_name"],
            "d_in → d_sae": f"{sae['d_in']} → {sae['d_sae']}",
        }
        for sae in saes
    ]
    texts = ("SAE", "architecture", "hook point", "d_in → d_sae")
    by = {str(sae["trained_with"]): "" for sae in saes if sae.get("trained_with")}
    for who in by:
        by[who] = ", ".join(s["sae_id"] for s in saes if s.get("trained_with") == who)
    trained = [f"Trained with {who}: {which}" for who, which in by.items()]
    return [_table((*texts, "l0", "loss_recovered", "gamma"), rows), *trained]


def plugins_table(plugins: list[dict[str, Any]]) -> list[Table | str]:
    """One line per plugin, with the names that it registers."""
    rows = [
        {
            **plugin,
            "distribution": f"{plugin['distribution']} {plugin['version']}".strip(),
            "brings": "\n".join(
                f"{kind}: {', '.join(names)}" for kind, names in plugin["brings"].items()
            ),
            "status": ": ".join(filter(None, (plugin["status"], plugin["error"]))),
        }
        for plugin in plugins
    ]
    return [_table(("distribution", "module", "brings", "status"), rows)]


def report_lines(written: dict[str, Any]) -> list[Table | str]:
    """The fairest comparison, and where the page with all of them is."""
    lead, *others = written["sentences"] or [""]
    more = f" (with {len(others)} more comparisons in its table)" if others else ""
    return [*filter(None, [lead]), f"Page: {written['page']}{more}"]


def push_lines(done: dict[str, Any]) -> list[Table | str]:
    """What a push has done."""
    if "dry_run" in done:
        state = done["based_on"] or "a repository that is new, or out of reach"
        return [f"Nothing was sent. What a push onto {state} would give is in {done['dry_run']}."]
    if not done["sent"]:
        return [f"{done['url']} already holds all of it; nothing was sent."]
    where = done["pull_request"] or f"{done['url']} (commit {done['commit']})"
    return [*(f"sent {path}" for path in done["sent"]), f"Pushed and read back: {where}"]


def export_lines(done: dict[str, Any]) -> list[Table | str]:
    """What was exported, and what it was checked on."""
    checked = " and ".join(done["checked_on"]) or "nothing, for nothing was converted"
    return [f"{done['from']} as {done['architecture']}: {done['path']} (checked on {checked})"]
