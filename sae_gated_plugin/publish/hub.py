"""Publish SAEs on the Hugging Face Hub in one commit, and see what a repository holds.

`push` builds everything first, then compares it with what is there, sends what differs in a single
commit on top of the state it has read, and reads the hashes back. A push that dies leaves the
repository as it was, and doing it again does what is missing. The token is huggingface_hub's own
(`hf auth login`, or HF_TOKEN); nothing here sees it.

A repository: `README.md`, `figures/`, and per SAE a folder with `cfg.json` and
`sae_weights.safetensors`, which `SAE.from_pretrained("owner/name", "folder")` loads,
`sparsity.safetensors`, `runner_cfg.json`, `run.yaml` and `results.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from ..config.yaml import read_yaml, to_yaml
from ..errors import ArtifactError, ConfigError, HubError, SaeGatedError, first_line
from ..files import read_json
from ..report.page import write_report
from ..saes.load import is_training_form, load_sae, require_folded
from ..training.run_folder import RESULTS_FILE, RUN_FILE
from . import convert
from .card import CARD_FILE, Card, Entry, render, require_readable
from .clean import clean
from .client import answering, patiently, room_on_disk


def push(
    runs: Sequence[str | Path],
    repo: str,
    *,
    form: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: str | Path | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    unmeasured: bool = False,
    api: HfApi | None = None,
) -> dict[str, Any]:
    """Publish runs, each in a folder of its own name, in one commit; return what was done.

    form: "native" or "jumprelu"; default jumprelu for prolu, so that plain SAELens loads it.
    base_model, dataset: names on the Hub, in place of local folders. license: an SPDX name.
    dry_run: write what the repository would get to this folder, and send nothing; where the Hub
    cannot be reached, as for a new repository (`based_on` is None then). unmeasured: take
    runs without results.json. api: the client, default huggingface_hub's.

    Raises ArtifactError for a run that cannot be published, HubError for what the Hub refuses.
    """
    _require_repo_id(repo)
    if form is not None and form not in convert.FORMS:
        raise ConfigError(f"form is '{form}'; allowed: {', '.join(convert.FORMS)}.")
    folders = {Path(run).resolve().name: Path(run) for run in runs}
    if len(folders) < len(runs):
        raise ConfigError("Two runs have the same folder name; each is published under its name.")
    if not folders:
        raise ConfigError("There is nothing to push: no run was given.")
    for name in folders:
        if not re.fullmatch(r"[\w.+=-]+", name):
            raise ConfigError(f"Folder name '{name}' cannot be an SAE's id: letters, digits, .+=-_")
    api = api or HfApi()
    with room_on_disk(), tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        files: dict[str, Path] = {}
        for name, folder in folders.items():
            staged = _stage(folder, staging / name, form, base_model, dataset, unmeasured)
            files.update({f"{name}/{file}": path for file, path in staged.items()})
        if dry_run is not None:
            remote = _Remote(repo)
            if not constants.HF_HUB_OFFLINE:
                with contextlib.suppress(Exception):  # without the Hub, as for a new repository
                    remote = _read(api, repo, revision)
            return _write(dry_run, _complete(files, remote, staging, license), remote)
        if constants.HF_HUB_OFFLINE:
            raise HubError("huggingface_hub is offline (HF_HUB_OFFLINE); --dry-run needs no Hub.")
        return patiently(
            repo, lambda: _send(api, repo, files, staging, private, revision, create_pr, license)
        )


def list_saes(
    repo: str, revision: str | None = None, api: HfApi | None = None
) -> list[dict[str, Any]]:
    """Return what a repository holds: `sae_id`, `architecture`, and what its results say."""
    _require_repo_id(repo)
    api = api or HfApi()
    remote = patiently(repo, lambda: _read(api, repo, revision))
    if remote.sha is None:
        raise HubError(f"There is no repository '{repo}', or it is not yours to see.")
    return [
        {
            "sae_id": entry.sae_id,
            "architecture": entry.config.get("architecture"),
            "hook_name": entry.metadata.get("hook_name"),
            "d_in": entry.config.get("d_in"),
            "d_sae": entry.config.get("d_sae"),
            **{
                key: (entry.results or {}).get(key)
                for key in ("l0", "fvu", "gamma", "gamma_ci", "loss_recovered", "dead_share")
            },
        }
        for entry in remote.entries
    ]


def _stage(
    run: Path,
    staging: Path,
    form: str | None,
    base_model: str | None,
    dataset: str | None,
    unmeasured: bool,
) -> dict[str, Path]:
    """The files of one SAE: name → path, weights where they are, everything else cleaned."""
    sae = load_sae(run)
    require_folded(sae)
    native = sae.cfg.architecture()
    weights = run
    staging.mkdir()
    if (form or ("jumprelu" if native == "prolu" else "native")) == "jumprelu":
        converted = convert.to_jumprelu(sae)
        convert.check_conversion(sae, converted)
        weights = staging / "converted"
        converted.save_model(weights)
    elif is_training_form(run):
        weights = staging / "inference"
        sae.save_model(weights)
    del sae
    if not (run / RESULTS_FILE).exists() and not unmeasured:
        raise ArtifactError(
            f"'{run}' has no {RESULTS_FILE}, so its card would have no numbers. Measure it "
            f"(sae-gated eval {shlex.quote(str(run))} --json > "
            f"{shlex.quote(str(run / RESULTS_FILE))}), or give --unmeasured."
        )
    files = {SAE_WEIGHTS_FILENAME: weights / SAE_WEIGHTS_FILENAME}
    if (run / SPARSITY_FILENAME).exists():
        files[SPARSITY_FILENAME] = run / SPARSITY_FILENAME
    renamed = {"model_name": base_model, "dataset_path": dataset, "dataset": dataset}
    for name, source in (
        (SAE_CFG_FILENAME, weights),
        (RUNNER_CFG_FILENAME, run),
        (RESULTS_FILE, run),
        (RUN_FILE, run),
    ):
        if not (source / name).exists():
            continue
        value = clean(_parse(source / name), {k: v for k, v in renamed.items() if v})
        if name == RESULTS_FILE:
            value["path"] = run.name
        text = (
            to_yaml(value)
            if name.endswith(".yaml")
            else json.dumps(value, indent=2, allow_nan=False) + "\n"
        )
        files[name] = staging / name
        files[name].write_text(text, encoding="utf-8")
    return files


def _parse(path: Path) -> dict[str, Any]:
    return read_yaml(path) if path.suffix == ".yaml" else read_json(path)


@dataclass(frozen=True)
class _Remote:
    """What a repository holds. hashes: path → sha256 of LFS files, git's sha1 of others."""

    repo: str
    sha: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    entries: Sequence[Entry] = ()
    card: str | None = None


def _read(api: HfApi, repo: str, revision: str | None) -> _Remote:
    """What is there, as of one commit; an empty state for a repository that is not there."""
    try:
        sha, hashes = _files(api, repo, revision)
    except RevisionNotFoundError:
        return _Remote(repo)
    except RepositoryNotFoundError:
        return _Remote(repo)

    def fetch(path: str) -> Any:
        if path not in hashes:
            return None
        with answering(repo):
            local = hf_hub_download(
                repo, path, revision=sha, endpoint=api.endpoint, token=api.token
            )
        try:
            return _parse(Path(local)) if path != CARD_FILE else Path(local).read_text("utf-8")
        except UnicodeDecodeError:
            raise HubError(f"{CARD_FILE} of '{repo}' is not UTF-8; mend it first.") from None
        except SaeGatedError:
            return None  # somebody else's file

    entries: list[Entry] = []
    for path in sorted(hashes):
        name, _, file = path.rpartition("/")
        config = fetch(path) if name and file == SAE_CFG_FILENAME else None
        if config is not None:
            entry = Entry(
                name, config, fetch(f"{name}/{RESULTS_FILE}"), fetch(f"{name}/{RUN_FILE}")
            )
            with contextlib.suppress(ConfigError):  # somebody else's, which no card could show
                require_readable(entry)
                entries.append(entry)
    return _Remote(repo, sha, hashes, entries, fetch(CARD_FILE))


def _files(api: HfApi, repo: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """The commit of a revision, and its files: path → sha256 of LFS files, git's sha1 of others."""
    with answering(repo):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        found = {s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or []}
        if not all(isinstance(text, str) for text in (info.sha, *found)):
            raise TypeError("it has no commit, or a file without a name")
        # No path of a repository is like that, and files of these names are written here.
        strange = [path for path in found if {"", ".", ".."} & set(re.split(r"[/\\]", path))]
        if strange:
            raise ValueError(f"it names a file '{strange[0]}'")
        return str(info.sha), {path: str(digest or "") for path, digest in found.items()}


def _complete(
    files: Mapping[str, Path], remote: _Remote, staging: Path, license: str | None
) -> dict[str, Path]:
    """Add the card and the figures, which are about all SAEs of the repository."""
    own = sorted({path.split("/")[0] for path in files})
    entries = {entry.sae_id: entry for entry in remote.entries}
    for name in own:
        value = {
            file: _parse(files[f"{name}/{file}"])
            for file in (SAE_CFG_FILENAME, RESULTS_FILE, RUN_FILE)
            if f"{name}/{file}" in files
        }
        entries[name] = Entry(
            name, value[SAE_CFG_FILENAME], value.get(RESULTS_FILE), value.get(RUN_FILE)
        )
    complete = dict(files)
    results = staging / "results"
    shutil.rmtree(results, ignore_errors=True)
    for entry in entries.values():
        if entry.results is not None:
            (results / entry.sae_id).mkdir(parents=True, exist_ok=True)
            text = json.dumps({"label": entry.trained_as, **entry.results})
            (results / entry.sae_id / RESULTS_FILE).write_text(text, encoding="utf-8")
    try:
        written = write_report([results], staging / "report")
        for figure in written["figures"]:
            name = f"figures/{Path(figure).name}"
            complete[name] = staging / "report" / "figures" / Path(figure).name
    except SaeGatedError:
        pass  # nothing measured, or SAEs of different hook points: no curves to draw
    figures = [path for path in complete if path.startswith("figures/")]
    card = Card(remote.repo, list(entries.values()), figures, license)
    (staging / CARD_FILE).write_text(render(card, remote.card), encoding="utf-8")
    complete[CARD_FILE] = staging / CARD_FILE
    return complete


def _write(folder: str | Path, files: Mapping[str, Path], remote: _Remote) -> dict[str, Any]:
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"Folder '{target}' is not empty; nothing was changed.")
    for path, source in files.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / path)
    return {"dry_run": str(target), "files": sorted(files), "sent": [], "based_on": remote.sha}


def _send(
    api: HfApi,
    repo: str,
    files: Mapping[str, Path],
    staging: Path,
    private: bool,
    revision: str | None,
    create_pr: bool,
    license: str | None,
) -> dict[str, Any]:
    with answering(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
    remote = _read(api, repo, revision)
    complete = _complete(files, remote, staging, license)
    hashes = {path: _hashes(source) for path, source in complete.items()}
    changed = [path for path in sorted(complete) if remote.hashes.get(path) not in hashes[path]]
    result = {
        "repo": repo,
        "url": f"{api.endpoint}/{repo}",
        "files": sorted(complete),
        "sent": changed,
        "commit": remote.sha,
    }
    if not changed:
        return result
    names = sorted({path.split("/")[0] for path in files})
    with answering(repo):
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path, str(complete[path])) for path in changed],
            commit_message=f"Upload {', '.join(names)}",
            revision=revision,
            parent_commit=remote.sha,
            create_pr=create_pr,
        )
    _, found = _files(api, repo, commit.oid)
    wrong = [path for path in sorted(complete) if found.get(path) not in hashes[path]]
    if wrong:
        raise HubError(
            f"After the commit {commit.oid} these files are not what was sent: {', '.join(wrong)}."
        )
    return {**result, "commit": commit.oid, "pull_request": commit.pr_url}


def _hashes(path: Path) -> tuple[str, str]:
    """sha256, and git's sha1 of the blob, read in pieces."""
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
            sha1.update(piece)
    return sha256.hexdigest(), sha1.hexdigest()


def _require_repo_id(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"'{repo}' is no repository's name: {first_line(error)}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"'{repo}' is no repository's name; it must be OWNER/NAME.")
