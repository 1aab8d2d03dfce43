"""Adapters on the Hugging Face hub: fetched through its own cache on this disk, pushed to an imitation."""

import inspect
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from support.hub_server import Repository
from support.models import Transformer, tokens, trained

from fourier_moe import describe_adapter, load_adapter, push_adapter, save_adapter
from fourier_moe.files.hub import local_directory

COMMIT, NEWER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache as huggingface_hub lays it out, with two commits of owner/name; main is the first."""
    directory = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(directory))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = directory / "models--owner--name"
    for commit, metrics in ((COMMIT, {"accuracy": 0.25}), (NEWER, {"accuracy": 0.5})):
        saved = save_adapter(trained(), tmp_path / commit, metrics=metrics)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in saved.iterdir():
            blob = repository / "blobs" / f"{commit}-{path.name}"
            blob.parent.mkdir(exist_ok=True)
            path.rename(blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (repository / "refs/newer").write_text(NEWER)
    return repository


@pytest.mark.parametrize(
    ("path", "accuracy"),
    [
        ("hf://owner/name", 0.25),
        ("hf://owner/name@main", 0.25),
        ("hf://owner/name@newer", 0.5),
        (f"hf://owner/name@{NEWER}", 0.5),
    ],
)
def test_adapter_is_read_from_the_revision_that_is_asked_for(cache, path, accuracy):
    model, x = Transformer().eval(), tokens(4, 5, 16)
    assert load_adapter(model, path).metrics == describe_adapter(path).metrics == {"accuracy": accuracy}
    assert torch.equal(model(x), trained()(x))


@pytest.mark.parametrize("path", ["hf://owner/other", "hf://owner/name@missing", f"hf://owner/name@{'c' * 40}"])
def test_what_is_not_in_the_cache_without_a_network_is_one_line(cache, path):
    with pytest.raises(ValueError, match=rf"{path} cannot be fetched: .*fetch it where there is a network, and give") as caught:
        load_adapter(Transformer(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["hf://", "hf://name", "hf://owner/name@", "hf://a/b/c", "hf://owner/name@a@b", "hf://o w/n"])
def test_path_of_another_form_is_an_error(path):
    with pytest.raises(ValueError, match="must be hf://owner/name or hf://owner/name@revision"):
        local_directory(path)


def test_damaged_file_in_the_cache_is_an_error(cache):
    blob = cache / "blobs" / f"{COMMIT}-adapter.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"snapshots/a+/adapter.safetensors is damaged"):
        describe_adapter("hf://owner/name")


def hub_error(kind, message):
    response = SimpleNamespace(headers={}, request=None, status_code=404, text="", json=dict)
    return kind(message, response=response)


@pytest.fixture
def saved(tmp_path):
    return save_adapter(trained(), tmp_path / "saved")


@pytest.fixture
def served(hub, saved):
    hub.models["owner/name"] = Repository({path.name: path.read_bytes() for path in saved.iterdir()} | {"other.bin": b"x"})
    return hub


def test_only_the_adapters_own_files_are_fetched_and_only_once(served):
    assert describe_adapter("hf://owner/name") == describe_adapter("hf://owner/name@main")
    assert sorted(served.fetched()) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.parametrize("where", ["GET /api", "adapter.safetensors"])
def test_one_server_error_is_got_over(served, where):
    served.fail(where, 500)
    describe_adapter("hf://owner/name")


@pytest.mark.parametrize(
    ("prepare", "path", "expected"),
    [
        (
            None,
            "hf://owner/other",
            r"no model 'owner/other', or it is private \(404\); check the name; for a private one log in",
        ),
        (None, "hf://owner/name@v2", r"owner/name has no revision 'v2' \(404\); give a branch, a tag or a commit"),
        (
            "gated",
            "hf://owner/name",
            r"restricted \(401\); accept its terms at http.*/owner/name, then log in with `hf auth login`",
        ),
        (
            "emptied",
            "hf://owner/name",
            r"it has no adapter.safetensors and no adapter.json; give a repository that push_adapter",
        ),
        ("down", "hf://owner/name", r"500 .*\(fetch it where there is a network, and give its directory\)$"),
    ],
)
def test_what_the_hub_answers_is_one_line_with_what_to_do(served, prepare, path, expected):
    if prepare == "gated":
        served.models["owner/name"].gated = True
    elif prepare == "emptied":
        served.models["owner/name"].files = {"README.md": b""}
    elif prepare == "down":
        served.fail("GET /api", 500, times=99)
    with pytest.raises(ValueError, match=rf"{path} cannot be fetched: .*{expected}") as caught:
        describe_adapter(path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- pushing


class FakeHub:
    """In the place of HfApi: takes what the real one would take, and keeps it."""

    def __init__(self, monkeypatch, refuse=None):
        self.repositories, self.files, self.refuse = {}, {}, refuse
        real = huggingface_hub.HfApi
        hub = self

        class Api:
            def __init__(self, **options):
                inspect.signature(real).bind(**options)

            def create_repo(self, *args, **options):
                inspect.signature(real.create_repo).bind(self, *args, **options)
                if hub.refuse:
                    raise hub.refuse
                hub.repositories[args[0]] = options

            def upload_folder(self, **options):
                inspect.signature(real.upload_folder).bind(self, **options)
                paths = [path.name for path in options["folder_path"].iterdir()]
                sent = huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=options["allow_patterns"])
                hub.files[options["repo_id"]] = sorted(sent), options["commit_message"]
                return SimpleNamespace(oid=COMMIT)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def test_push_sends_the_adapters_files_and_nothing_else(tmp_path, monkeypatch):
    hub, saved = FakeHub(monkeypatch), save_adapter(trained(), tmp_path)
    (saved / "secret.txt").touch()
    (saved / "adapter.json.part").touch()
    assert push_adapter(saved, "owner/name") == f"hf://owner/name@{COMMIT}"
    assert hub.repositories == {"owner/name": {"private": True, "exist_ok": True}}
    assert hub.files["owner/name"] == (["README.md", "adapter.json", "adapter.safetensors"], "Adapter: FourierMoEConfig")
    push_adapter(str(saved), "owner/name", private=False, commit_message="better")
    assert hub.repositories["owner/name"]["private"] is False
    assert hub.files["owner/name"][1] == "better"


def test_damaged_adapter_is_not_pushed(tmp_path, monkeypatch):
    hub, saved = FakeHub(monkeypatch), save_adapter(trained(), tmp_path)
    path = saved / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        push_adapter(saved, "owner/name")
    assert hub.repositories == {}


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "hf://owner/name", ""])
def test_repository_of_another_form_is_an_error(tmp_path, monkeypatch, repo_id):
    FakeHub(monkeypatch)
    with pytest.raises(ValueError, match=r"repo_id='.*' must be owner/name"):
        push_adapter(save_adapter(trained(), tmp_path), repo_id)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, r"knows no such login \(401\); log in with `hf auth login`"),
        (403, r"this login may not write to owner \(403\); use a token with write permission, and your own name"),
        (404, r"may not write to owner \(404\)"),
        (500, r"500 .*nothing here is lost, push again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_to_do(hub, saved, status, expected):
    hub.fail("POST /api/repos/create", status, times=99)
    with pytest.raises(ValueError, match=rf"cannot be pushed to owner/name: .*{expected}") as caught:
        push_adapter(saved, "owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["repos/create", "preupload", "commit"])
def test_a_push_gets_over_one_server_error_and_is_loaded_back(hub, saved, where):
    hub.fail(where, 500)
    path = push_adapter(saved, "owner/name")
    assert describe_adapter(path) == describe_adapter(saved)


def test_a_push_replaces_the_older_adapter_s_peft_files_or_removes_them(hub, saved):
    names = {"adapter_config.json", "adapter_model.safetensors"}
    for present in (names, set()):
        for name in names:
            (saved / name).write_text("new") if name in present else (saved / name).unlink(missing_ok=True)
        hub.models["owner/name"] = Repository(dict.fromkeys([*names, "notes.txt"], b"old"))
        push_adapter(saved, "owner/name")
        pushed = hub.models["owner/name"].files
        assert {name for name in pushed if pushed[name] == b"new"} == names & pushed.keys() == present
        assert pushed["notes.txt"] == b"old"


def test_package_does_not_import_the_hub_before_it_is_needed():
    import subprocess
    import sys

    code = "import sys, fourier_moe; sys.exit('huggingface_hub' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_network_is_noticed_by_the_real_client(hub, monkeypatch):
    """Online, with an empty cache, and every connection refused."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"hf://owner/name cannot be fetched: .*fetch it where there is a network, and give"):
        describe_adapter("hf://owner/name")
