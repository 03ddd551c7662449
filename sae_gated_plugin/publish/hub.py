"""Publish SAEs on the Hugging Face Hub in one commit, and see what a repository holds.

`push` lays out everything in a folder first, as the repository will have it, sends what differs in
a single commit on top of the state it has read, and reads the hashes back. A push that dies leaves
the repository as it was, and doing it again does what is missing. The token is huggingface_hub's
own (`hf auth login`, or HF_TOKEN); nothing here sees it.

A repository: `README.md`, `figures/`, and per SAE a folder with `cfg.json` and
`sae_weights.safetensors`, which `SAE.from_pretrained("owner/name", "folder")` loads,
`sparsity.safetensors`, `runner_cfg.json`, `run.yaml` and `results.json`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from huggingface_hub.utils.sha import git_hash
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SPARSITY_FILENAME

from ..config.run import QUICKSTART
from ..config.yaml import read_yaml, to_yaml
from ..errors import ArtifactError, ConfigError, HubError, SaeGatedError, first_line
from ..files import read_json, sha256
from ..plugins.about import SAELENS, about
from ..plugins.records import logger
from ..report.page import figures_of
from ..saes.load import load_sae
from ..training.run_folder import RESULTS_FILE, RUN_FILE
from . import convert
from .card import CARD_FILE, HUB_ID, Card, Entry, render, require_readable
from .clean import clean
from .client import answering, patiently, room_on_disk

#: What a card is made from.
_READ = (SAE_CFG_FILENAME, RESULTS_FILE, RUN_FILE)


def push(
    runs: Sequence[str | Path],
    repo: str,
    *,
    names: Sequence[str] = (),
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
    """Publish runs, each in a folder of its own, in one commit; return what was done.

    names: of these folders, one for each run; default the runs' own names. form: "native" or
    "jumprelu"; default is the one that plain SAELens loads, if there is such a form.
    base_model, dataset: names on the Hub, in place of local folders. license: an SPDX name.
    dry_run: write what the repository would get to this folder, and send nothing; where the Hub
    cannot be reached, as for a new repository (`based_on` is None then). unmeasured: take
    runs without results.json. api: the client, default huggingface_hub's.

    Raises ArtifactError for a run that cannot be published, HubError for what the Hub refuses.
    """
    _require_repo_id(repo)
    folders = _folders(runs, names)
    if dry_run is not None:
        convert.require_empty(dry_run)
    client = api or HfApi()
    branch = None if revision == constants.DEFAULT_REVISION else revision
    renamed = {"model_name": base_model, "dataset_path": dataset, "dataset": dataset}
    renamed = {key: name for key, name in renamed.items() if name}
    with room_on_disk(), tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        for name, folder in folders.items():
            _stage(folder, stage / name, form, renamed, unmeasured)
        _warn_of_base_model(_entries(stage).values())

        def send() -> dict[str, Any]:
            with answering(repo):
                client.create_repo(repo, private=private, exist_ok=True)
                if revision is not None:
                    client.create_branch(repo, branch=revision, exist_ok=True)
            remote = _read(client, repo, revision)
            files = _complete(stage, remote, Card(repo, (), license=license, revision=branch))
            with answering(repo):
                commit = client.create_commit(
                    repo,  # the client leaves out what the repository holds already
                    [CommitOperationAdd(path, stage / path) for path in files],
                    commit_message=f"Upload {', '.join(sorted(folders))}",
                    revision=revision,
                    parent_commit=remote.sha,
                    create_pr=create_pr,
                )
                _, found = _hashes(client, repo, commit.oid)
            wrong = [path for path in files if not _is(stage / path, found.get(path, ""))]
            if wrong:
                raise HubError(
                    f"After the commit {commit.oid} these files are not what was sent: "
                    f"{', '.join(wrong)}."
                )
            return {
                "repo": repo,
                "url": f"{client.endpoint}/{repo}",
                "files": files,
                "sent": [path for path in files if found[path] != remote.hashes.get(path)],
                "commit": commit.oid,
                "pull_request": commit.pr_url,
            }

        if dry_run is None:
            return patiently(send)
        remote = _Remote()
        with contextlib.suppress(HubError):  # without the Hub, as for a new repository
            remote = _read(client, repo, revision)
        files = _complete(stage, remote, Card(repo, (), license=license, revision=branch))
        shutil.copytree(stage, dry_run, copy_function=shutil.copyfile, dirs_exist_ok=True)
        return {"dry_run": str(dry_run), "files": files, "sent": [], "based_on": remote.sha}


def list_saes(
    repo: str, revision: str | None = None, api: HfApi | None = None
) -> list[dict[str, Any]]:
    """Return what a repository holds: `sae_id`, `architecture`, and what its results say."""
    _require_repo_id(repo)
    client = api or HfApi()
    remote = patiently(lambda: _read(client, repo, revision))
    if remote.sha is None:
        raise HubError(f"There is no repository '{repo}', or you may not see it.")
    return [
        {
            "sae_id": entry.sae_id,
            "architecture": entry.architecture,
            "trained_with": entry.plugin or None,
            "hook_name": entry.metadata.get("hook_name"),
            "d_in": entry.config.get("d_in"),
            "d_sae": entry.config.get("d_sae"),
            **{
                key: (entry.results or {}).get(key)
                for key in ("l0", "fvu", "gamma", "gamma_ci", "loss_recovered", "dead_share")
            },
        }
        for entry in remote.entries.values()
    ]


def _stage(
    run: Path, staged: Path, form: str | None, renamed: Mapping[str, str], unmeasured: bool
) -> None:
    """Write the files of one SAE, in its inference form and cleaned."""
    sae = load_sae(run)
    if not (run / RESULTS_FILE).exists() and not unmeasured:
        raise ArtifactError(
            f"'{run}' has no {RESULTS_FILE}, so its card would have no numbers. Measure it "
            f"(sae-gated eval {shlex.quote(str(run))} --json > "
            f"{shlex.quote(str(run / RESULTS_FILE))}), or give --unmeasured."
        )
    native = sae.cfg.architecture()
    if form is None:
        convertible = native not in SAELENS and callable(about(native).jumprelu)
        form = "jumprelu" if convertible else "native"
    convert.in_form(sae, form)[0].save_model(staged)
    if (run / SPARSITY_FILENAME).exists():
        shutil.copyfile(run / SPARSITY_FILENAME, staged / SPARSITY_FILENAME)
    for name in (*_READ, RUNNER_CFG_FILENAME):
        source = (staged if name == SAE_CFG_FILENAME else run) / name
        if source.exists():
            value = clean(_parse(source), renamed)
            if name == RESULTS_FILE:
                value["path"] = staged.name
            as_json = json.dumps(value, indent=2, allow_nan=False) + "\n"
            text = to_yaml(value) if source.suffix == ".yaml" else as_json
            (staged / name).write_text(text, encoding="utf-8")


def _parse(path: Path) -> dict[str, Any]:
    return read_yaml(path) if path.suffix == ".yaml" else read_json(path)


def _entries(folder: Path) -> dict[str, Entry]:
    """The SAEs in a folder laid out as a repository; what cannot be read there is left out."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.rglob(SAE_CFG_FILENAME)):
        values: dict[str, Any] = {}
        for name in _READ:
            with contextlib.suppress(SaeGatedError):  # missing, or another program's
                values[name] = _parse(path.with_name(name))
        if config := values.get(SAE_CFG_FILENAME):
            sae_id = path.parent.relative_to(folder).as_posix()
            found[sae_id] = Entry(sae_id, config, values.get(RESULTS_FILE), values.get(RUN_FILE))
    return found


@dataclass(frozen=True)
class _Remote:
    """What a repository holds. hashes: path → sha256 of LFS files, git's sha1 of others."""

    sha: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    card: str | None = None


def _read(client: HfApi, repo: str, revision: str | None) -> _Remote:
    """What is there, as of one commit; nothing for a repository or a branch that is not there."""
    patterns = [CARD_FILE, *_READ, *(f"*/{name}" for name in _READ)]
    with answering(repo):
        try:
            sha, hashes = _hashes(client, repo, revision)
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return _Remote()
        if not any(filter_repo_objects(hashes, allow_patterns=patterns)):
            return _Remote(sha, hashes)
        folder = Path(client.snapshot_download(repo, revision=sha, allow_patterns=patterns))
    entries: dict[str, Entry] = {}
    for sae_id, entry in _entries(folder).items():
        with contextlib.suppress(ConfigError):  # another program's, which no card could show
            require_readable(entry)
            entries[sae_id] = entry
    try:
        card = (folder / CARD_FILE).read_text("utf-8") if CARD_FILE in hashes else None
    except UnicodeDecodeError:
        raise HubError(f"{CARD_FILE} of '{repo}' is not UTF-8; mend it first.") from None
    return _Remote(sha, hashes, entries, card)


def _hashes(client: HfApi, repo: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """The commit of a revision, and its files' hashes, as _Remote has them."""
    info = client.model_info(repo, revision=revision, files_metadata=True)
    if not isinstance(info.sha, str):
        raise TypeError("it has no commit")
    found = {s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or []}
    return info.sha, {path: str(digest or "") for path, digest in found.items()}


def _is(path: Path, digest: str) -> bool:
    """Whether a file has this hash, one of _Remote's."""
    return digest == (sha256(path) if len(digest) == 64 else git_hash(path.read_bytes()))


def _complete(stage: Path, remote: _Remote, card: Card) -> list[str]:
    """Add the card and the figures, which are about all SAEs of the repository; list all files."""
    entries = {**remote.entries, **_entries(stage)}
    figures = stage / "figures"
    figures.mkdir(exist_ok=True)
    for stale in figures.glob("*.png"):  # of an attempt on top of another state
        stale.unlink()
    drawn: dict[str, str] = {}
    with contextlib.suppress(ConfigError):  # nothing measured, or SAEs of different hook points
        for drawing in figures_of(
            [{"label": e.trained_as, **e.results} for e in entries.values() if e.results]
        ):
            (figures / f"{drawing.name}.png").write_bytes(drawing.png)
            drawn[f"figures/{drawing.name}.png"] = drawing.title
    text = render(replace(card, entries=list(entries.values()), figures=drawn), remote.card)
    (stage / CARD_FILE).write_text(text, encoding="utf-8")
    return sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())


def _warn_of_base_model(entries: Iterable[Entry]) -> None:
    local = {str(entry.metadata.get("model_name")) for entry in entries} - {QUICKSTART}
    local = sorted(name for name in local if not HUB_ID.fullmatch(name))
    if local:
        logger.warning(
            "The card's metadata will name no base model for '%s', which is no model's name on the "
            "Hub (OWNER/NAME); give it with --base-model.",
            "', '".join(local),
        )


def _folders(runs: Sequence[str | Path], names: Sequence[str]) -> dict[str, Path]:
    """The runs by the name that each gets in the repository."""
    if not runs:
        raise ConfigError("There is nothing to push: no run was given.")
    if names and len(names) != len(runs):
        raise ConfigError(f"There are {len(names)} names (--name) for {len(runs)} runs; give each.")
    folders = dict(zip(names or [Path(run).resolve().name for run in runs], map(Path, runs)))
    if len(folders) < len(runs):
        raise ConfigError(
            "Two runs have the same folder name, under which each would be published; name them "
            "with --name, once for each run."
        )
    for name in folders:
        if not re.fullmatch(r"(?=.*[^.])[\w.+=-]+", name):
            raise ConfigError(
                f"'{name}' cannot be an SAE's name: it takes letters, digits and .+=-_ only. Give "
                "another with --name."
            )
    return folders


def _require_repo_id(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"'{repo}' is no repository's name: {first_line(error)}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"'{repo}' is no repository's name; it must be OWNER/NAME.")
