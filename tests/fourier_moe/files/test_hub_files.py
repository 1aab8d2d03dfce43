"""Files of the hub, with huggingface_hub's real client and the faults of a real network."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import huggingface_hub
import pytest
from support.hub_server import Repository as Served

from fourier_moe.files.hub_files import HubError, Repository

FILES = {"small.json": b"{}", "weights.bin": bytes(range(256)) * 4000}


@pytest.fixture
def served(hub):
    hub.models["owner/name"] = Served(dict(FILES))
    return hub


@pytest.fixture
def told():
    return []


def fetch(told, name="owner/name", revision=None, paths=tuple(FILES)):
    listing = Repository(name, revision=revision).look_up(told.append)
    return {path: file.read_bytes() for path, file in zip(paths, listing.fetch(paths, told.append), strict=True)}


def test_files_are_fetched_once_small_ones_first_and_their_size_is_told_before(served, told):
    assert fetch(told) == FILES
    assert served.fetched() == ["small.json", "weights.bin"]
    assert told[0].startswith(f"Fetching 2 files, 1 MB, of owner/name at {served.models['owner/name'].commit[:7]} to ")
    assert fetch(told) == FILES
    assert served.fetched() == ["small.json", "weights.bin"]
    assert served.looked_up() == ["owner/name"] * 2


def test_submodules_of_the_client_need_not_be_imported_yet(served, told, monkeypatch):
    """As in a new process: the package imports its modules when they are first used."""
    monkeypatch.delattr(huggingface_hub, "constants")
    assert fetch(told) == FILES


def test_all_processes_of_a_run_may_note_the_commit_at_once(served):
    commits = [f"{number:040x}" for number in range(50)]
    repository = Repository("owner/name")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(repository.remember, [commit for commit in commits for _ in range(8)]))
    assert [file.name for file in (repository.cache / "refs").iterdir()] == ["main"]
    assert (repository.cache / "refs" / "main").read_text() in commits


def test_a_cache_in_which_nothing_can_be_noted_serves_its_files(served, told, monkeypatch):
    assert fetch(told) == FILES

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fourier_moe.files.hub_files.write_file", refuse)
    (Repository("owner/name").cache / "refs" / "main").unlink()
    assert fetch(told) == FILES
    assert told[-1] == "owner/name is not found offline: its commit cannot be noted in the cache (Permission denied)"


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("GET /api/", 500),
        ("GET /api/", 503),
        ("HEAD /owner/name/resolve", 500),
        ("weights.bin", 500),
        ("GET /owner/name/resolve", "drop"),
        ("GET /owner/name/resolve", "cut"),
    ],
)
def test_one_fault_is_got_over(served, told, where, kind):
    served.fail(where, kind)
    assert fetch(told) == FILES


def test_a_dropped_file_is_resumed_where_it_broke_off(served, told):
    served.fail("GET /owner/name/resolve/" + served.models["owner/name"].commit + "/weights.bin", "drop")
    assert fetch(told) == FILES
    assert [line.rpartition("/")[2] for line in served.requests].count("weights.bin") == 3  # HEAD, GET, GET


def test_a_server_that_stays_broken_is_named_with_its_status(served, told):
    served.fail("GET /owner/name/resolve", 500, times=99)
    with pytest.raises(HubError, match=r"small\.json: .*500 ") as caught:
        fetch(told)
    assert "\n" not in str(caught.value)
    assert sum("trying again" in line for line in told) == 3


def test_what_a_server_refuses_is_not_asked_for_again(served, told):
    served.models["owner/name"].gated = True
    page = f"{served.url}/owner/name"
    with pytest.raises(HubError, match=rf"restricted \(401\); accept its terms at {page}, then log in with `hf auth login`"):
        fetch(told)
    served.fail("GET /api", 401)
    with pytest.raises(HubError, match=r"does not accept the token .* \(401\); log in"):
        fetch(told)
    served.fail("GET /api", 403)
    with pytest.raises(HubError, match=r"refuses access to owner/name \(403\); use a token that may read it"):
        fetch(told)
    assert not any("trying again" in line for line in told)


def test_names_that_are_not_there_are_told_apart_from_revisions(served, told):
    with pytest.raises(HubError, match=r"no model 'owner/other', or it is private \(404\); check the name"):
        fetch(told, "owner/other")
    with pytest.raises(HubError, match=r"owner/name has no revision 'v2' \(404\); give a branch, a tag or a commit of it"):
        fetch(told, revision="v2")


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "dead network"])
def test_without_a_network_the_cache_is_taken_and_it_is_said(served, told, monkeypatch, offline):
    fetch(told)
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    told.clear()
    assert fetch(told) == FILES
    commit = served.models["owner/name"].commit[:7]
    assert [line for line in told if f"taking commit {commit} from" in line]
    reason = "HF_HUB_OFFLINE forbids" if offline else "Connect"
    with pytest.raises(HubError, match=reason):
        fetch(told, "owner/other")


def test_an_interrupted_download_does_not_hide_the_version_before(served, told, monkeypatch):
    fetch(told)
    served.models["owner/name"].files = {"small.json": b"{}\n", "weights.bin": b"newer"}
    served.fail("weights.bin", 500, times=99)
    with pytest.raises(HubError):
        fetch(told)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert fetch(told) == FILES


def test_a_commit_is_found_again_without_a_network(served, told, monkeypatch):
    commit = served.models["owner/name"].commit
    fetch(told, revision=commit)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert fetch(told, revision=commit) == FILES


def test_a_full_disk_is_refused_before_anything_is_fetched(served, told, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(HubError, match=r"needs 1 MB in .*, where 1 MB are free; make room, or set HF_HOME"):
        fetch(told)
    assert served.fetched() == []


def test_a_log_without_a_terminal_shows_progress(served, told, monkeypatch):
    monkeypatch.setattr("fourier_moe.files.hub_files.LOG_SECONDS", 0.0)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    fetch(told)
    lines = [line for line in told if line.startswith("  weights.bin: ")]
    assert "  weights.bin: 512 kB of 1 MB" in lines or len(lines) > 3
