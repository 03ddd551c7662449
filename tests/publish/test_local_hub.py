"""The local Hub as the real client sees it; what the client retries by itself is written down here.

The client runs in this process with its waits recorded instead of slept, and once in a subprocess.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    file_download,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, get_session
from support.local_hub import TOKEN, LocalHub

REPO = "tester/sae"
README = b"---\nlibrary_name: saelens\ntags:\n- sae\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 400  # 100 kB
FILES = {"README.md": README, "layer_2/cfg.json": b"{}\n", "layer_2/sae.safetensors": WEIGHTS}
SAFETENSORS = "layer_2/sae.safetensors"
# What a cut connection looks like, depending on who notices first.
CUT = (httpx2.NetworkError, httpx2.RemoteProtocolError)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    before = set(threading.enumerate())
    with LocalHub() as hub:
        yield hub
    assert not [t for t in threading.enumerate() if t not in before and "request" in t.name]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client wanted to wait before each of its retries."""
    waits: list[float] = []
    for module in (_http, file_download):
        clock = SimpleNamespace(**{**vars(time), "sleep": waits.append})
        monkeypatch.setattr(module, "time", clock)
    return waits


@pytest.fixture
def api(
    hub: LocalHub, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> HfApi:
    return hub.patch_client(monkeypatch, tmp_path / "home")


@pytest.fixture
def push(hub: LocalHub, api: HfApi) -> Callable[..., CommitInfo]:
    """Commit files to an existing repo; further arguments go to `create_commit`."""
    hub.create(REPO)

    def push(files: dict[str, bytes] = FILES, **options: object) -> CommitInfo:
        adds = [CommitOperationAdd(path, data) for path, data in files.items()]
        return api.create_commit(REPO, adds, commit_message="push", **options)  # type: ignore

    return push


def commits(hub: LocalHub) -> int:
    return len(hub.repos[REPO].commits) - 1  # without the first, which comes with the repo


def test_create_push_and_load(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    url = api.create_repo(REPO, private=True)
    assert url.repo_id == REPO
    assert api.whoami()["name"] == "tester"
    operations = [CommitOperationAdd(path, data) for path, data in FILES.items()]
    info = api.create_commit(REPO, operations, commit_message="push", commit_description="why")
    assert info.repo_url.repo_id == REPO
    assert [call.status for call in hub.calls("POST", "/commit/main")] == [200]
    assert len(hub.calls("PUT", "/lfs/")) == 1
    assert hub.files(REPO) == {**FILES, ".gitattributes": hub.files(REPO)[".gitattributes"]}

    assert set(api.list_repo_files(REPO)) == {*FILES, ".gitattributes"}
    path = hf_hub_download(REPO, SAFETENSORS, cache_dir=tmp_path / "a")
    assert Path(path).read_bytes() == WEIGHTS
    folder = Path(snapshot_download(REPO, cache_dir=tmp_path / "b"))
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert folder.name == info.oid

    model = api.model_info(REPO, files_metadata=True)
    assert model.sha == info.oid
    assert model.private
    assert model.card_data is not None
    assert model.card_data.tags == ["sae"]
    siblings = {sibling.rfilename: sibling for sibling in model.siblings or []}
    lfs = siblings[SAFETENSORS].lfs
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert (siblings["README.md"].lfs, siblings["README.md"].size) == (None, len(README))

    tree = {entry.path for entry in api.list_repo_tree(REPO)}
    assert tree == {".gitattributes", "README.md", "layer_2"}
    (entry,) = api.get_paths_info(REPO, [SAFETENSORS, "none"], expand=True)
    assert entry.last_commit is not None
    assert entry.last_commit.oid == info.oid
    newest, first = api.list_repo_commits(REPO)
    assert (newest.commit_id, newest.title, newest.message) == (info.oid, "push", "why")
    assert first.title == "initial commit"

    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True) == url
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)


def test_subprocess(hub: LocalHub, tmp_path: Path) -> None:
    """The environment is enough for the client's own defaults; one real wait for a retry."""
    hub.fail(("POST", "/preupload/"), 500)
    code = f"""
import huggingface_hub as h
h.create_repo({REPO!r})
h.create_commit({REPO!r}, [h.CommitOperationAdd("a.safetensors", b"abc")], commit_message="m")
print(open(h.hf_hub_download({REPO!r}, "a.safetensors")).read())
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout == "abc\n", run.stderr
    assert (tmp_path / "home" / "hub" / "models--tester--sae").is_dir()
    assert all("hf_hub/" in call.user_agent for call in hub.calls("POST", "/api/"))
    # The storage link is signed and gets no token; everything else for a repo has it.
    assert not hub.calls("PUT", "/lfs/")[0].authorized
    assert all(call.authorized for call in hub.calls("POST", "."))


def test_no_ops_and_deletions(hub: LocalHub, api: HfApi, push: Callable[..., CommitInfo]) -> None:
    first = push()
    assert push().oid == first.oid  # no commit at all
    assert (commits(hub), len(hub.calls("PUT", "."))) == (1, 1)
    push({**FILES, "README.md": README + b"more"})
    assert (commits(hub), len(hub.calls("PUT", "."))) == (2, 1)
    copy = [CommitOperationCopy(SAFETENSORS, "b.safetensors"), CommitOperationDelete("layer_2/")]
    api.create_commit(REPO, copy, commit_message="move")
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", "b.safetensors"}
    assert len(hub.calls("PUT", ".")) == 1
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.create_commit(REPO, [CommitOperationDelete("layer_2/")], commit_message="again")
    head = hub.repos[REPO].branches["main"]
    assert api.create_commit(REPO, [], commit_message="nothing").oid == head


def test_commit_is_checked_and_atomic(
    hub: LocalHub, api: HfApi, push: Callable[..., CommitInfo]
) -> None:
    url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
    header, file = (
        '{"key": "header", "value": {"summary": "s"}}\n',
        '{"key": "file", "value": {"path": "a", "content": "YQ==", "encoding": "base64"}}\n',
    )
    unknown = '{"key": "lfsFile", "value": {"path": "b", "oid": "%s", "size": 1}}\n' % ("0" * 64)
    for body in (header + file + unknown, header + file + file[:40], file, "", header + "{}\n"):
        answer = get_session().post(url, content=body, headers={"Authorization": f"Bearer {TOKEN}"})
        assert (answer.status_code, commits(hub)) == (400, 0), body
    answer = get_session().post(url, content=header, headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, commits(hub)) == (200, 1)  # empty, but a commit

    with pytest.raises(ValueError, match="not a mapping"):
        push({"README.md": b"---\njust text\n---\n"})
    with pytest.raises(ValueError, match="YAML Metadata Error"):
        push({"README.md": "---\nλ: [\n---\n".encode()})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push({"README.md": b"# A title alone\n"})


def test_parent_commit_conflict(hub: LocalHub, push: Callable[..., CommitInfo]) -> None:
    parent = hub.repos[REPO].branches["main"]
    hub.before(("POST", "/commit/"), lambda: hub.commit(REPO, {"other": b"first"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push(parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert set(hub.files(REPO)) == {".gitattributes", "other"}
    push(parent_commit=hub.repos[REPO].branches["main"])
    assert set(hub.files(REPO)) == {".gitattributes", "other", *FILES}


def test_branches_and_pull_requests(
    hub: LocalHub, api: HfApi, push: Callable[..., CommitInfo], tmp_path: Path
) -> None:
    first = push()
    api.create_branch(REPO, branch="try/1")
    push({"new.txt": b"branch"}, revision="try/1")
    assert "new.txt" not in hub.files(REPO)
    request = push({"new.txt": b"pull"}, create_pr=True)
    assert (request.pr_num, request.pr_revision) == (1, "refs/pr/1")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "try/1"]
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1"]
    for revision, text in {"try/1": "branch", "refs/pr/1": "pull", request.oid: "pull"}.items():
        path = hf_hub_download(REPO, "new.txt", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_text() == text
        assert api.model_info(REPO, revision=revision).sha != first.oid
        assert api.file_exists(REPO, "new.txt", revision=revision)
    push({"new.txt": b"pulled again"}, revision="refs/pr/1")
    assert hub.files(REPO, "refs/pr/1")["new.txt"] == b"pulled again"

    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="try/1")
    with pytest.raises(RevisionNotFoundError):
        push({"new.txt": b""}, revision="none")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "README.md", revision="none", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "none", cache_dir=tmp_path)


def test_rights(hub: LocalHub, api: HfApi) -> None:
    hub.users["hf_somebodyelse"] = "else"
    hub.create("tester/secret", private=True)
    hub.create("tester/open")
    hub.create("else/open")
    other, nobody, wrong = (
        HfApi(hub.endpoint, token=token) for token in ("hf_somebodyelse", False, "hf_wrong")
    )
    assert api.model_info("tester/secret").private
    for stranger, status in ((other, 404), (nobody, 401)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            stranger.model_info("tester/secret")
        assert caught.value.response.status_code == status
        assert not stranger.repo_exists("tester/secret")
        assert stranger.model_info("tester/open").id == "tester/open"
    for call in (lambda: nobody.create_repo("tester/a"), lambda: wrong.create_repo("tester/a")):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert error.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    for forbidden in (
        lambda: api.create_repo("else/new"),
        lambda: api.delete_repo("else/open"),
        lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="else/open"),
    ):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            forbidden()
    pull = api.upload_file(
        path_or_fileobj=b"a", path_in_repo="a.safetensors", repo_id="else/open", create_pr=True
    )
    assert pull.pr_revision == "refs/pr/1"  # proposing needs no right to write


def test_received_finds_what_was_sent(hub: LocalHub, push: Callable[..., CommitInfo]) -> None:
    push({"cfg.json": b'{"path": "/home/me/data"}', "a.safetensors": b"inside weights"})
    sent = b"\n".join(hub.received())
    assert b"/home/me/data" in sent  # although the commit carries it in base64
    assert b"inside weights" in sent
    assert TOKEN.encode() not in sent


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("step", ["/preupload/", "/lfs/objects/batch", "/lfs/tester", "/verify"])
def test_client_retries_uploads(
    hub: LocalHub, push: Callable[..., CommitInfo], waits: list[float], step: str, status: int
) -> None:
    method = "PUT" if step == "/lfs/tester" else "POST"
    hub.fail((method, step), status, times=2)
    push()
    assert [call.status for call in hub.calls(method, step)] == [status, status, 200]
    assert (commits(hub), waits) == (1, [1, 2])


def test_client_gives_up_after_six_attempts(
    hub: LocalHub, push: Callable[..., CommitInfo], waits: list[float]
) -> None:
    hub.fail(("POST", "/preupload/"), 503, times=99)
    with pytest.raises(HfHubHTTPError) as error:
        push()
    assert error.value.response.status_code == 503
    assert (len(hub.calls("POST", "/preupload/")), waits) == (6, [1, 2, 4, 8, 8])


def test_client_obeys_retry_after(
    hub: LocalHub, push: Callable[..., CommitInfo], waits: list[float]
) -> None:
    hub.fail(("PUT", "/lfs/"), 429, headers={"Retry-After": "7"})
    push()
    assert (commits(hub), waits) == (1, [8])  # the client adds a second


@pytest.mark.parametrize("status", [429, 500, 502])
def test_client_does_not_retry_commits(
    hub: LocalHub, push: Callable[..., CommitInfo], waits: list[float], status: int
) -> None:
    hub.fail(("POST", "/commit/"), status, headers={"Retry-After": "1"})
    with pytest.raises(HfHubHTTPError) as error:
        push()
    assert error.value.response.status_code == status
    assert (commits(hub), len(hub.calls("POST", "/commit/")), waits) == (0, 1, [])
    push()
    assert (commits(hub), len(hub.calls("PUT", "."))) == (1, 1)  # the upload was not lost


@pytest.mark.parametrize("after_bytes", [0, 30, None])
def test_torn_commit_changes_nothing(
    hub: LocalHub, push: Callable[..., CommitInfo], after_bytes: int | None
) -> None:
    hub.drop(("POST", "/commit/"), after_bytes=after_bytes)
    with pytest.raises(CUT):
        push()
    assert (commits(hub), [call.status for call in hub.calls("POST", "/commit/")]) == (0, [0])


def test_commit_whose_answer_is_lost(hub: LocalHub, push: Callable[..., CommitInfo]) -> None:
    """The client cannot know that its commit was made; a second attempt finds nothing to do."""
    hub.drop(("POST", "/commit/"), after_bytes=0, where="response")
    with pytest.raises(CUT):
        push()
    assert commits(hub) == 1
    assert push().oid == hub.repos[REPO].branches["main"]
    assert commits(hub) == 1
    hub.fail(("POST", "/commit/"), 504, after=True)
    with pytest.raises(HfHubHTTPError):
        push({"a": b"a"})
    assert commits(hub) == 2


@pytest.mark.parametrize("from_file", [False, True])
def test_client_repeats_a_cut_upload(
    hub: LocalHub, api: HfApi, push: Callable[..., CommitInfo], waits: list[float],
    tmp_path: Path, from_file: bool,
) -> None:  # fmt: skip
    (tmp_path / "w").write_bytes(WEIGHTS)
    hub.drop(("PUT", "/lfs/"), times=2, after_bytes=50_000)
    source = tmp_path / "w" if from_file else WEIGHTS
    api.upload_file(path_or_fileobj=source, path_in_repo="w.safetensors", repo_id=REPO)
    puts = hub.calls("PUT", "/lfs/")
    assert [(put.status, len(put.body)) for put in puts] == [
        (0, 50_000), (0, 50_000), (200, len(WEIGHTS)),
    ]  # fmt: skip
    assert (hub.files(REPO)["w.safetensors"], waits) == (WEIGHTS, [1, 2])


def test_cut_upload_that_stays_cut(hub: LocalHub, push: Callable[..., CommitInfo]) -> None:
    hub.drop(("PUT", "/lfs/"), times=99)
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        push()
    assert isinstance(error.value.__cause__, CUT)
    assert (commits(hub), len(hub.calls("PUT", "/lfs/"))) == (0, 6)


def test_rejected_upload(hub: LocalHub, push: Callable[..., CommitInfo]) -> None:
    hub.fail(("PUT", "/lfs/"), 403)
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        push()
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert (commits(hub), len(hub.calls("PUT", "/lfs/"))) == (0, 1)


def test_verify_refuses_wrong_bytes(hub: LocalHub, push: Callable[..., CommitInfo]) -> None:
    def spoil() -> None:
        uploads = hub.repos[REPO].uploads
        uploads.update({oid: data[:-1] for oid, data in uploads.items()})

    hub.before(("POST", "/lfs/verify"), spoil)
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        push()
    assert "another size or sha256" in str(error.value.__cause__)
    assert (commits(hub), hub.repos[REPO].lfs) == (0, {})


@pytest.mark.parametrize(("chunk", "range_"), [(10 * 2**20, None), (10_000, "bytes=30000-")])
def test_client_repeats_a_cut_download(
    hub: LocalHub,
    push: Callable[..., CommitInfo],
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    chunk: int,
    range_: str | None,
) -> None:
    """It resumes after its last whole chunk; a file below 10 MiB it fetches again."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    push()
    hub.drop(("GET", "/resolve/"), after_bytes=30_000, where="response")
    assert Path(hf_hub_download(REPO, SAFETENSORS, cache_dir=tmp_path)).read_bytes() == WEIGHTS
    gets = hub.calls("GET", "/resolve/")
    assert [get.headers.get("range") for get in gets] == [None, range_]
    assert ([get.status for get in gets], waits) == ([200, 206 if range_ else 200], [1])


def test_what_the_client_does_with_failing_downloads(
    hub: LocalHub, push: Callable[..., CommitInfo], waits: list[float], tmp_path: Path
) -> None:
    push()

    def download() -> bytes:
        path = hf_hub_download(REPO, SAFETENSORS, cache_dir=tmp_path, force_download=False)
        return Path(path).read_bytes()

    hub.fail(("GET", "/resolve/"), 500)  # not retried
    with pytest.raises(HfHubHTTPError) as error:
        download()
    assert (error.value.response.status_code, waits) == (500, [])
    hub.drop(("HEAD", "/resolve/"), where="response", after_bytes=0)  # not retried either
    with pytest.raises(CUT):
        download()
    assert waits == []
    hub.fail(("HEAD", "/resolve/"), 500, times=2)  # once at once, then with waits
    hub.fail(("GET", "/resolve/"), 429)
    assert download() == WEIGHTS
    assert waits == [1, 1]


def test_client_does_not_retry_metadata(
    hub: LocalHub, api: HfApi, push: Callable[..., CommitInfo], waits: list[float], tmp_path: Path
) -> None:
    push()
    hub.fail(("GET", "/api/models/[^/]+/[^/]+$"), 500)
    with pytest.raises(HfHubHTTPError):
        api.model_info(REPO)
    hub.fail(("GET", "/revision/main"), 500)
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(REPO, cache_dir=tmp_path)
    hub.fail(("POST", "/api/repos/create"), 500)
    with pytest.raises(HfHubHTTPError):
        api.create_repo("tester/new")
    hub.fail(("POST", "/branch/"), 500)
    with pytest.raises(HfHubHTTPError):
        api.create_branch(REPO, branch="b")
    hub.fail(("POST", "/validate-yaml"), 503)
    with pytest.raises(HfHubHTTPError):
        push({"README.md": README + b"new"})
    assert waits == []
    hub.fail(("GET", "/tree/"), 500)  # lists that come in pages are retried
    hub.fail(("GET", "/commits/"), 500)
    assert len(list(api.list_repo_tree(REPO))) == 3
    assert len(api.list_repo_commits(REPO)) == 2
    assert waits == [1, 1]


def test_delay_before_and_matching(hub: LocalHub, api: HfApi) -> None:
    hub.create(REPO)
    hub.delay(lambda request: request.path == f"/api/models/{REPO}", 0.3)
    begin = time.monotonic()
    api.model_info(REPO)
    middle = time.monotonic()
    assert middle - begin >= 0.3
    seen: list[str] = []
    hub.before(lambda request: request.flag("blobs"), lambda: seen.append("before"))
    for _ in range(2):
        api.model_info(REPO)
        api.model_info(REPO, files_metadata=True)
    assert seen == ["before"]


def test_stopping_does_not_wait_for_a_delay(
    monkeypatch: pytest.MonkeyPatch, waits: list[float], tmp_path: Path
) -> None:
    hub = LocalHub().start()
    api = hub.patch_client(monkeypatch, tmp_path)
    hub.create(REPO)
    hub.delay(("GET", "."), 60)
    client = threading.Thread(target=lambda: api.repo_exists(REPO), daemon=True)
    client.start()
    while not hub.requests:
        time.sleep(0.01)
    begin = time.monotonic()
    hub.stop()
    client.join(10)
    assert time.monotonic() - begin < 5
    with pytest.raises(httpx2.ConnectError):
        api.model_info(REPO)
