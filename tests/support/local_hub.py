"""A small Hugging Face Hub on 127.0.0.1, for tests of the real `huggingface_hub` client.

It speaks what the client (Xet off) speaks when this package pushes, lists and loads: create,
branch, preupload, LFS, commit, pull request, metadata and downloads, of model repos alone.
Everything is kept in memory. Faults (errors, dropped connections, competing commits) are set for
the requests that a test picks, and every request is kept, so that a test can count commits and
search what was sent.

    with LocalHub() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path / "home"))
        api = hub.patch_client(monkeypatch, tmp_path / "home")  # or in this process
        assert len(hub.calls("POST", "/commit/")) == 1
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pytest
from huggingface_hub import HfApi, constants, file_download, hf_api

try:
    from huggingface_hub.utils import close_session
except ImportError:  # before 1.0
    from huggingface_hub.utils import reset_sessions as close_session

from support.hub_http import Server
from support.hub_records import (
    BASE64_VALUE,
    GITATTRIBUTES,
    ID,
    REV,
    ROUTES,
    TOKEN,
    Fault,
    HubError,
    Match,
    Repo,
    Request,
    Response,
    check_card,
    route,
)


class LocalHub:
    """The server, its state and its faults; every method may be called from any thread.

    One user, `owner` with `token`, who may write below the own name alone. *.safetensors go
    through LFS.
    """

    def __init__(self) -> None:
        self.owner, self.token = "tester", TOKEN
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._server: Server | None = None
        self.endpoint = ""

    def start(self) -> LocalHub:
        self._server = Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._server.start()
        return self

    def stop(self) -> None:
        """Close every connection and wait for every thread."""
        if self._server is not None:
            self._server.stop()
            self._server = None
        close_session()  # before 1.0 the client's session remembers that it was not offline

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # How a client comes here.

    def environment(self, home: Path) -> dict[str, str]:
        """The whole environment of a subprocess whose client knows this Hub alone."""
        unwanted = re.compile(r"(?i)HF_|HUGGING|.*_PROXY$")
        kept = {name: v for name, v in os.environ.items() if not unwanted.match(name)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def patch_client(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> HfApi:
        """Point the client of this process here, the module-level functions included.

        The client read its environment when it was imported. Its endpoint and the template of its
        download links must change together, or downloads would still go to the real Hub.
        """
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        }.items():
            for module in (constants, file_download):  # before 1.0 the latter had its own copies
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        monkeypatch.setenv("HF_TOKEN", self.token)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        close_session()  # it may have read the environment
        return HfApi(endpoint=self.endpoint, token=self.token)

    # What a test does to the Hub, without HTTP.

    def create(self, repo_id: str, private: bool = False) -> Repo:
        with self._lock:
            repo = self.repos[repo_id] = Repo(repo_id, private)
            repo.add("main", {".gitattributes": GITATTRIBUTES}, set())
            return repo

    def commit(self, repo_id: str, files: Mapping[str, bytes]) -> str:
        """Add files as another account would; returns the commit's id."""
        with self._lock:
            repo = self.repos[repo_id]
            head = repo.find("main")
            big = {path for path in files if path.endswith(".safetensors")}
            repo.lfs |= {hashlib.sha256(files[path]).hexdigest(): files[path] for path in big}
            return repo.add("main", {**head.files, **files}, {*head.lfs, *big}).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            return dict(self.repos[repo_id].find(revision).files)

    def calls(self, method: str, pattern: str) -> list[Request]:
        """The requests so far with this method and this regex in their path."""
        with self._lock:
            return [r for r in self.requests if _matches((method, pattern), r)]

    def received(self) -> Iterator[bytes]:
        """All that clients sent except the Authorization header, base64 contents decoded too."""
        with self._lock:
            requests = list(self.requests)
        for request in requests:
            yield repr((request.method, request.path, request.query, request.headers)).encode()
            yield request.body
            for encoded in BASE64_VALUE.findall(request.body):
                try:
                    yield base64.b64decode(encoded, validate=True)
                except binascii.Error:  # some other text
                    continue

    # Faults.

    def fail(
        self,
        match: Match,
        status: int = 500,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        after: bool = False,
    ) -> None:
        """Answer with an error; with `after`, carry the request out first (a gateway's 504)."""
        response = Response({"error": "set by the test"}, status, dict(headers or {}))
        self._set("fail", match, times, (response, after))

    def drop(
        self,
        match: Match,
        times: int = 1,
        after_bytes: int | None = None,
        where: Literal["request", "response"] = "request",
    ) -> None:
        """Cut the connection after so many bytes of the body (half of it if not given).

        In a response the request was carried out; after 0 bytes not even its status is sent.
        """
        self._set(f"drop {where}", match, times, after_bytes)

    def before(self, match: Match, callback: Callable[[], object], times: int = 1) -> None:
        """Call something when the request has arrived and before it is carried out."""
        self._set("before", match, times, callback)

    def _set(self, kind: str, match: Match, times: int, value: Any) -> None:
        with self._lock:
            self._faults.append(Fault(kind, match, times, value))

    def _take(self, kind: str, request: Request) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.times > 0 and _matches(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    # Answers.

    def handle(self, request: Request) -> Response:
        """Answer a request that has arrived completely, with the faults set for it."""
        if fault := self._take("before", request):
            fault.value()  # without the lock: it may well use this Hub
        failure = self._take("fail", request)
        if failure and not failure.value[1]:
            return failure.value[0]
        with self._lock:  # one at a time, so that nobody sees half a commit
            try:
                response = self._answer(request)
            except HubError as error:
                response = error.response
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                response = HubError(400, f"Malformed request: {error!r}").response
        return failure.value[0] if failure else response

    def _answer(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, function in ROUTES:
            if wanted == method and (match := pattern.fullmatch(request.path)):
                answer = function(self, request, *(unquote(g or "") for g in match.groups()))
                return answer if isinstance(answer, Response) else Response(answer)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _user(self, request: Request) -> str | None:
        if request.token not in (None, self.token):
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.owner if request.token else None

    def _repo(self, request: Request, repo_id: str, write: bool = False) -> Repo:
        """A repo that this client may see; a private one looks like none to everybody else."""
        user, repo = self._user(request), self.repos.get(repo_id)
        mine = user == repo_id.split("/")[0]
        if user is None and (repo is None or repo.private or write):
            # The client takes a bare 401 for a missing repo only over https, hence the code.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not mine):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and not mine:
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repo

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Any:
        _, *found = check_card(json.loads(request.body)["content"])
        errors, warnings = ([{"message": text} for text in texts] for texts in found)
        return Response({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request) -> Any:
        if not (user := self._user(request)):
            raise HubError(401, "Invalid username or password.")
        body = json.loads(request.body)
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        if repo_id.split("/")[0] != user:
            raise HubError(403, f"You don't have the rights to create a model as {repo_id}")
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.create(repo_id, body.get("visibility") == "private" or bool(body.get("private")))
        return {"url": url, "name": repo_id}

    @route("POST", rf"/api/models/{ID}/preupload/{REV}")
    def _preupload(self, request: Request, repo_id: str, revision: str) -> Any:
        repo = self._repo(request, repo_id, write=not request.flag("create_pr"))
        commit, answer = repo.find(revision), []
        for item in json.loads(request.body)["files"]:
            mode = "lfs" if item["path"].endswith(".safetensors") else "regular"
            described = {"path": item["path"], "uploadMode": mode, "shouldIgnore": False}
            if item["path"] in commit.files:
                entry = commit.entry(item["path"])
                described["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answer.append(described)
        return {"files": answer}

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo_id: str) -> Any:
        repo = self._repo(request, repo_id)
        if self._user(request) is None:  # any user may upload, for a pull request
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        objects = json.loads(request.body)["objects"]
        for item in (item for item in objects if item["oid"] not in repo.lfs):
            href = (
                f"{self.endpoint}/lfs/{repo_id}/{item['oid']}?signature={self._sign(item['oid'])}"
            )
            verify = f"{self.endpoint}/{repo_id}.git/info/lfs/verify"
            item["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    def _sign(self, oid: str) -> str:
        return hashlib.sha256(f"{self.endpoint} {oid}".encode()).hexdigest()[:16]

    @route("PUT", rf"/lfs/{ID}/([0-9a-f]{{64}})")
    def _lfs_put(self, request: Request, repo_id: str, oid: str) -> Any:
        # No token comes here: the link itself is the permission, as with signed storage links.
        if request.query.get("signature") != [self._sign(oid)]:
            raise HubError(403, "SignatureDoesNotMatch")
        self.repos[repo_id].uploads[oid] = request.body
        return Response(b"")

    @route("POST", rf"/{ID}\.git/info/lfs/verify")
    def _lfs_verify(self, request: Request, repo_id: str) -> Any:
        repo, item = self._repo(request, repo_id), json.loads(request.body)
        data = repo.uploads.get(item["oid"])
        if data is None:
            raise HubError(404, "Object was not uploaded")
        if len(data) != item["size"] or hashlib.sha256(data).hexdigest() != item["oid"]:
            raise HubError(422, "Uploaded object has another size or sha256")
        repo.lfs[item["oid"]] = data
        return {}

    @route("POST", rf"/api/models/{ID}/commit/{REV}")
    def _commit(self, request: Request, repo_id: str, revision: str) -> Any:
        create_pr = request.flag("create_pr")
        repo = self._repo(request, repo_id, write=not create_pr)
        items = [json.loads(line) for line in request.body.splitlines()]
        if not items or items[0]["key"] != "header" or not items[0]["value"]["summary"]:
            raise HubError(400, "The first line must be a header with a summary")
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, base = items[0]["value"], repo.find(revision)
        if parent := header.get("parentCommit"):
            if create_pr:
                base = repo.find(parent)
            elif base != repo.find(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files, lfs = dict(base.files), set(base.lfs)
        for item in items[1:]:
            path, value = item["value"]["path"], item["value"]
            if item["key"] == "lfsFile":
                files[path] = repo.lfs[value["oid"]]  # KeyError, a 400, where it was not uploaded
                lfs.add(path)
            else:
                files[path] = base64.b64decode(value["content"], validate=True)
        _, errors, _ = check_card(files.get("README.md", b"").decode(errors="replace"))
        if errors:
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
        branch = f"refs/pr/{number}" if create_pr else revision
        made = repo.add(branch, files, lfs)
        url = f"{self.endpoint}/{repo_id}"
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {})

    @route("POST", rf"/api/models/{ID}/branch/{REV}")
    def _create_branch(self, request: Request, repo_id: str, branch: str) -> Any:
        repo = self._repo(request, repo_id, write=True)
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        if branch.startswith("refs/"):
            raise HubError(400, "Invalid reference for a branch")
        if branch in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[branch] = repo.find(start).oid
        return {}

    @route("GET", rf"/api/models/{ID}(?:/revision/{REV})?")
    def _model_info(self, request: Request, repo_id: str, revision: str) -> Any:
        repo = self._repo(request, repo_id)
        commit = repo.find(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if request.flag("blobs") else []:
            entry = commit.entry(sibling["rfilename"])
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if lfs := entry.get("lfs"):
                sibling["lfs"] = {"sha256": lfs["oid"]} | lfs
        card = check_card(commit.files.get("README.md", b"").decode(errors="replace"))[0]
        facts = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]}
        state = {"sha": commit.oid, "private": repo.private}
        return facts | state | {"siblings": siblings, "cardData": card, "tags": card.get("tags")}

    @route("GET", rf"/api/models/{ID}/tree/{REV}")
    def _tree(self, request: Request, repo_id: str, revision: str) -> Any:
        commit = self._repo(request, repo_id).find(revision)
        return [commit.entry(path) for path in sorted(commit.files)]  # as with `recursive`

    @route("GET", rf"/{ID}/resolve/{REV}/(.+)")
    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Any:
        commit = self._repo(request, repo_id).find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.response.headers |= headers  # the client remembers that this commit has none
            raise error
        data, entry = commit.files[path], commit.entry(path)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            headers["ETag"] = headers["X-Linked-Etag"] = f'"{entry["lfs"]["oid"]}"'
            headers["X-Linked-Size"] = str(len(data))
        return Response(data, 200, headers)


def _matches(match: Match, request: Request) -> bool:
    if callable(match):
        return match(request)
    return match[0] == request.method and re.search(match[1], request.path) is not None
