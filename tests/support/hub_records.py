"""What the Hub on 127.0.0.1 keeps: requests, answers, faults, commits, repos; and its routes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

REPO = "tester/saes"
TOKEN = "hf_localtokenlocaltoken"
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)(?:\r?\n)?^---\s*$", re.DOTALL | re.MULTILINE)
BASE64_VALUE = re.compile(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"')
ID, REV = r"([\w.-]+/[\w.-]+?)", r"([^/]+)"


class HubError(Exception):
    """An answer that refuses the request; `code` becomes X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.response = Response({"error": message, **body}, status, headers)


@dataclass
class Response:
    """An answer: bytes as they are, anything else as JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request as it arrived; `status` stays 0 if the connection was cut before an answer."""

    method: str
    path: str  # still url-quoted, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case, without Authorization
    token: str | None = field(repr=False)
    body: bytes = field(default=b"", repr=False)  # what arrived of it
    status: int = 0

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


Match = Callable[[Request], bool] | tuple[str, str]  # or (method, regex searched in the path)


@dataclass
class Fault:
    """What happens to the next `times` requests that match."""

    kind: str  # the name of the method that set it; "drop request" or "drop response"
    match: Match
    times: int
    value: Any


@dataclass(frozen=True)
class Commit:
    """A whole tree; `lfs` names the paths that are stored by sha256."""

    oid: str
    files: Mapping[str, bytes]
    lfs: frozenset[str]

    def entry(self, path: str) -> dict[str, Any]:
        """A file as /tree describes it."""
        data = self.files[path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob_oid(data)}
        if path in self.lfs:
            sha = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    """A model repo: every commit in the order of creation, and where the branches point."""

    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # verified uploads, by sha256
    uploads: dict[str, bytes] = field(default_factory=dict)  # not verified yet

    def find(self, revision: str) -> Commit:
        """The commit of a branch, of refs/pr/N or of a commit id."""
        oid = self.branches.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, branch: str, files: dict[str, bytes], lfs: set[str]) -> Commit:
        """Make a commit and move the branch to it, in one step."""
        tree = [(path, blob_oid(data)) for path, data in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([self.id, len(self.commits), tree]).encode()).hexdigest()
        self.commits.append(Commit(oid, files, frozenset(lfs)))
        self.branches[branch] = oid
        return self.commits[-1]


def blob_oid(data: bytes) -> str:
    """The id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_card(content: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The metadata of a README, what is wrong with it, and what is only worth a warning."""
    match = FRONT_MATTER.search(content)
    if not match or not match[1].strip():
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML Metadata Error: {error}"], []
    if not isinstance(metadata, dict):
        return {}, ["YAML Metadata Error: not a mapping"], []
    tags = metadata.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        return metadata, ['"tags" must be an array of strings'], []
    return metadata, [], []


Route = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """The function answers requests whose whole path matches; it gets the groups, unquoted."""

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register
