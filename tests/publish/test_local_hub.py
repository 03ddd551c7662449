"""The local Hub as the real client sees it: what the tests of publishing take for granted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from support.local_hub import TOKEN, LocalHub

REPO = "tester/sae"
README = b"---\nlibrary_name: saelens\ntags:\n- sae\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 400  # 100 kB
FILES = {"README.md": README, "layer_2/cfg.json": b"{}\n", "layer_2/sae.safetensors": WEIGHTS}


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    before = set(threading.enumerate())
    with LocalHub() as hub:
        yield hub
    assert not [t for t in threading.enumerate() if t not in before and "request" in t.name]


@pytest.fixture
def api(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
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


def test_what_is_pushed_is_there_once(
    hub: LocalHub, api: HfApi, push: Callable[..., CommitInfo], tmp_path: Path
) -> None:
    info = push()
    assert hub.files(REPO) == {**FILES, ".gitattributes": hub.files(REPO)[".gitattributes"]}
    folder = Path(api.snapshot_download(REPO, cache_dir=tmp_path))
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert push().oid == info.oid == folder.name  # nothing changed: no commit, no upload
    assert (commits(hub), len(hub.calls("PUT", "."))) == (1, 1)
    sent = b"\n".join(hub.received())
    assert README in sent  # although the commit carries it in base64
    assert WEIGHTS in sent
    assert TOKEN.encode() not in sent


def test_branches_pull_requests_and_conflicts(
    hub: LocalHub, api: HfApi, push: Callable[..., CommitInfo], tmp_path: Path
) -> None:
    first = push()
    api.create_branch(REPO, branch="try/1")
    push({"new.txt": b"branch"}, revision="try/1")
    request = push({"new.txt": b"pull"}, create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    for revision, text in {"try/1": "branch", "refs/pr/1": "pull"}.items():
        path = hf_hub_download(REPO, "new.txt", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_text() == text
    assert "new.txt" not in hub.files(REPO)
    hub.before(("POST", "/commit/"), lambda: hub.commit(REPO, {"other": b"first"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push({"new.txt": b""}, parent_commit=first.oid)
    assert caught.value.response.status_code == 412
    assert "new.txt" not in hub.files(REPO)


@pytest.mark.parametrize("after_bytes", [0, None])
def test_a_torn_commit_changes_nothing(
    hub: LocalHub, push: Callable[..., CommitInfo], after_bytes: int | None
) -> None:
    hub.drop(("POST", "/commit/"), after_bytes=after_bytes)
    with pytest.raises(Exception, match=r"(?i)reset|disconnected|closed"):
        push()
    assert (commits(hub), [call.status for call in hub.calls("POST", "/commit/")]) == (0, [0])


def test_rights(hub: LocalHub, api: HfApi) -> None:
    hub.create("tester/secret", private=True)
    hub.create("else/open")
    nobody = HfApi(hub.endpoint, token=False)
    assert api.model_info("tester/secret").private
    with pytest.raises(RepositoryNotFoundError):
        nobody.model_info("tester/secret")
    for client, status in ((nobody, 401), (HfApi(hub.endpoint, token="hf_wrong"), 401), (api, 403)):
        with pytest.raises(HfHubHTTPError) as error:
            client.create_repo("else/new")
        assert error.value.response.status_code == status
