"""What the commands print: tables and lines."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table


def sweep_table(output: str, rows: list[dict[str, Any]]) -> list[Table | str]:
    """One line per point, and where the files are."""
    table = Table("label", "settings", "seed", "L0", "recovered", "FVU", "γ", "dead")
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        if "error" in row:
            table.add_row(row["label"], settings, str(row["seed"]), f"failed: {row['error']}")
            continue
        forms = {name: _MEASURES[name][1] for name in ("l0", "loss_recovered", "fvu", "gamma")}
        values = [
            "none" if row[name] is None else form.format(row[name])
            for name, form in {**forms, "dead_share": _MEASURES["dead_share"][1]}.items()
        ]
        table.add_row(row["label"], settings, str(row["seed"]), *values)
    return [table, f"Files: {output}. Draw them: sae-gated report {output}"]


def toy_table(toy: dict[str, Any]) -> list[Table | str]:
    """One line per SAE, and where the heatmaps are."""
    label = Column("SAE", overflow="fold", min_width=16)
    table = Table(label, "L0", "FVU", "γ", "found", "composites", "firing")

    def share(value: float | None) -> str:
        return "none" if value is None else f"{value:.0%}"

    for sae in toy["saes"]:
        values = [
            "none" if sae[name] is None else form.format(sae[name])
            for name, form in (("l0", "{:.2f}"), ("fvu", "{:.3f}"), ("gamma", "{:.3f}"))
        ]
        shares = [share(sae[name]) for name in ("features_found", "composites_found")]
        firing = " / ".join(share(sae[f"firing_{name}"]) for name in ("precision", "recall"))
        table.add_row(sae["label"], *values, *shares, firing)
    return [
        f"{toy['num_features']} true features in {toy['hidden_dim']} dimensions, "
        f"{toy['saes'][0]['true_l0']:.2f} of them at a time",
        table,
        "found: features with a latent of their own at a cosine above 0.95; firing: precision and "
        "recall of the matched latents.",
        f"Heatmaps and numbers: {toy['path']}",
    ]


def report_lines(written: dict[str, Any]) -> list[Table | str]:
    """The report's sentences, and where the page is."""
    return [*written["sentences"], f"Page: {written['page']}"]


def push_lines(done: dict[str, Any]) -> list[Table | str]:
    """What a push has done."""
    if "dry_run" in done:
        state = done["based_on"] or "a repository that is new, or out of reach"
        return [f"Nothing was sent. What a push onto {state} would give is in {done['dry_run']}."]
    if not done["sent"]:
        return [f"{done['url']} already holds all of it; nothing was sent."]
    where = done["pull_request"] or f"{done['url']} (commit {done['commit']})"
    return [*(f"sent {path}" for path in done["sent"]), f"Pushed and read back: {where}"]


def saes_table(rows: list[dict[str, Any]]) -> list[Table | str]:
    """One line per SAE of a repository."""
    name = Column("SAE", overflow="fold", min_width=16)
    table = Table(name, "architecture", "hook point", "d_in → d_sae", "L0", "recovered", "γ")
    for row in rows:
        values = [
            "none" if row[name] is None else _MEASURES[name][1].format(row[name])
            for name in ("l0", "loss_recovered", "gamma")
        ]
        sizes = f"{row['d_in']} → {row['d_sae']}"
        table.add_row(row["sae_id"], row["architecture"], row["hook_name"], sizes, *values)
    return [table]


def export_lines(done: dict[str, Any]) -> list[Table | str]:
    """What was exported, and what it was checked on."""
    checked = " and ".join(done["checked_on"]) or "nothing, for nothing was converted"
    return [f"{done['from']} as {done['architecture']}: {done['path']} (checked on {checked})"]


_MEASURES = {
    "l0": ("L0, active latents per token", "{:.1f}"),
    "fvu": ("FVU, variance unexplained", "{:.4f}"),
    "gamma": ("γ, below 1 is shrinkage", "{:.4f}"),
    "gamma_centered": ("γ about the mean", "{:.4f}"),
    "loss_recovered": ("loss recovered", "{:.2%}"),
    "nats_lost": ("nats lost per token", "{:.4f}"),
    "kl": ("KL to the original model, nats", "{:.4f}"),
    "dead_share": ("dead latents", "{:.2%}"),
    "coherence": ("largest cosine similarity of decoder rows", "{:.4f}"),
    "coherence_top": ("the same, mean of the top 1 % of rows", "{:.4f}"),
    "babel": ("Babel function of the rows, k = 32", "{:.2f}"),
    "l1_coefficient": ("λ at the end, SAELens's units", "{:.4g}"),
}
_NOT_MEASURES = ("seconds", "target_l0", "training_tokens", "tokens", "d_in", "d_sae")


def results_table(results: dict[str, Any]) -> list[Table | str]:
    """Every measure in one column, strangers' metrics after ours, then what was measured where."""
    table = Table("measure", "value", "95 % interval or reason")
    others = {
        name: (name, "{:.4g}")
        for name, value in results.items()
        if name not in (*_MEASURES, *_NOT_MEASURES) and isinstance(value, int | float)
    }
    for name, (label, form) in {**_MEASURES, **others}.items():
        value, interval = results.get(name), results.get(f"{name}_ci")
        note = results["undefined"].get(name, "")
        if interval:
            note = " to ".join(map(form.format, interval))
        table.add_row(label, "none" if value is None else form.format(value), note)
    trained = results["training_tokens"]
    after = f" after {trained:,} training tokens" if trained else ""
    held_out = ", which training may have seen" if results["split"] == "train" else ""
    return [
        f"{results['architecture']} SAE, {results['d_in']} to {results['d_sae']}, at "
        f"{results['hook_name']}{after}",
        table,
        f"Measured on {results['tokens']:,} tokens of split '{results['split']}'{held_out}; "
        f"{results['seconds']} s.",
        f"Files: {results['path']}",
    ]


def gap_table(measured: dict[str, Any]) -> list[Table | str]:
    """One line per code, and how the error divides."""
    shown = ("l0", "fvu", "gamma", "loss_recovered")
    table = Table("code", "L0", "FVU", "γ", "recovered")
    for code, heading in (
        *(("encoder", "the encoder's"), ("refit", "its support, refitted")),
        ("pursuit", "a searched support"),
    ):
        values = [
            "none"
            if measured[code][name] is None
            else _MEASURES[name][1].format(measured[code][name])
            for name in shown
        ]
        table.add_row(heading, *values)
    shares = measured["shares"]
    claim = "How the error divides is not defined here: FVU has no value, or is 0."
    if shares:
        parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        claim = f"Of the encoder's FVU: {parts}."
    return [table, claim, f"Measured on {measured['tokens']:,} tokens; {measured['seconds']} s."]


def plugins_table(rows: list[dict[str, Any]]) -> list[Table | str]:
    """One line per plugin."""
    table = Table("distribution", "version", "module", "hooks", "status")
    for row in rows:
        status = str(row["status"]) + (f": {row['error']}" if row.get("error") else "")
        hooks = ", ".join(row["hooks"])
        table.add_row(row["distribution"], row["version"], row["module"], hooks, status)
    return [table]
