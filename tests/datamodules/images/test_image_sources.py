import lightning as L
import pytest
from support import hub_repositories
from support.hub_server import Repository

from datamodules import ImageDataModule
from datamodules.images import data_module
from datamodules.images.benchmarks import BENCHMARKS, HubBenchmark, find_benchmark
from fourier_moe.errors import UserError

HUB_NAMES = [name for name, source in BENCHMARKS.items() if isinstance(source, HubBenchmark)]


@pytest.fixture
def messages(monkeypatch):
    told = []
    for module in (data_module, "datamodules.shared.hub"):
        monkeypatch.setattr(f"{module if isinstance(module, str) else module.__name__}.rank_zero_info", told.append)
    return told


def module(name="svhn", **arguments):
    return ImageDataModule(name, **{"num_workers": 0, "image_size": 8, "batch_size": 4, **arguments})


def test_unknown_name_is_answered_with_near_names_and_all_names():
    with pytest.raises(ValueError, match=r"dataset 'eurosatt' is unknown \(did you mean eurosat\?\); choose one of cars, dtd"):
        find_benchmark("eurosatt")
    with pytest.raises(ValueError, match="dataset 'qqq' is unknown; choose one of"):
        find_benchmark("qqq")


@pytest.mark.parametrize("name", HUB_NAMES)
def test_number_of_classes_of_a_hub_data_set_is_known_before_it_is_loaded(name):
    data = ImageDataModule(name)
    assert data.num_classes == BENCHMARKS[name].num_classes
    assert data.class_names == []


@pytest.fixture
def svhn(hub):
    hub.datasets["ufldl-stanford/svhn"] = hub_repositories.image_repository(10, ("train", "test", "extra"), "cropped_digits")
    return hub


def test_only_the_splits_in_use_are_fetched_once_after_one_look_up(svhn, messages):
    data = module()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    parts = ["test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"]
    assert sorted(svhn.fetched()) == [f"cropped_digits/{part}.parquet" for part in parts]
    assert svhn.looked_up() == ["ufldl-stanford/svhn"]
    assert data.class_names[3] == "class 3"
    assert next(iter(data.val_dataloader()))["image"].shape == (2, 3, 8, 8)
    commit = svhn.datasets["ufldl-stanford/svhn"].commit
    assert data.data_revision == commit
    assert any("Fetching 3 files, 1" in line and f"at {commit[:7]} to" in line for line in messages)
    summary = next(line for line in messages if line.startswith("svhn: "))
    assert "train has 20 of the complete set's 73,257 images" in summary
    assert f"from hub id 'ufldl-stanford/svhn' at {commit[:7]}" in summary
    assert data.evaluation_notes == {"test": "20 of the complete set's 26,032 images"}


def test_a_process_that_did_not_prepare_asks_nobody(svhn):
    module().prepare_data()
    svhn.requests.clear()
    other = module()
    other.setup("fit")
    assert svhn.requests == []
    assert other.data_revision == svhn.datasets["ufldl-stanford/svhn"].commit


def test_revision_is_pinned_and_another_one_is_not_taken(svhn):
    repository = svhn.datasets["ufldl-stanford/svhn"]
    commit = repository.commit
    data = module(revision=commit)
    data.prepare_data()
    data.setup("test")
    repository.files["README.md"] = b"newer"
    again = module(revision=commit)
    again.setup("test")
    assert again.data_revision == commit
    with pytest.raises(RuntimeError, match=rf"svhn@{'c' * 40}.*has no revision '{'c' * 40}' \(404\); give a branch, a tag or"):
        module(revision="c" * 40).prepare_data()


def test_revision_of_local_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"revision 'v1' is one of the hub's data set, and directory '.*' reads no hub"):
        module(revision="v1", directory=str(tmp_path))
    with pytest.raises(ValueError, match="revision 'v1' is one of the hub's data set, and synthetic reads no hub"):
        module(revision="v1", synthetic=True)
    for name in ("digits", "custom"):
        with pytest.raises(ValueError, match=f"revision must be null for '{name}', which is not on the hub, got v1"):
            ImageDataModule(name, revision="v1", predict_directory=str(tmp_path))


def test_own_validation_split_of_the_hub_is_used(hub):
    splits = ["train", "validation", "test"]
    hub.datasets["dpdl-benchmark/sun397"] = hub_repositories.image_repository(397, splits)
    data = module("sun397")
    data.setup("validate")
    assert len(data.val_dataloader().dataset) == 2 * 397


def test_hub_data_set_with_other_classes_than_the_table_says_is_an_error(hub):
    hub.datasets["tanganke/dtd"] = hub_repositories.image_repository(3)
    with pytest.raises(UserError, match=r"'dtd' has 3 classes on the hub .* where 47 are expected"):
        module("dtd").setup("fit")


def test_layout_that_has_changed_is_named(hub):
    hub.datasets["tanganke/dtd"] = Repository({"train.zip": b"x"})
    with pytest.raises(RuntimeError, match=r"'tanganke/dtd' \(there are no files train\*\.parquet in data/\)"):
        module("dtd").prepare_data()


def test_unreachable_hub_is_one_error_with_the_other_ways(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    expected = (
        r"'dtd' .*'tanganke/dtd' \(Connect.*\)\. Without access to the hub, fetch `hf download tanganke/dtd --repo-type dataset"
        r" --include 'data/train\*' --include 'data/test\*' --local-dir DIR` elsewhere and give --data.directory DIR/data"
    )
    for step in (lambda data: data.prepare_data(), lambda data: data.setup("test")):
        with pytest.raises(RuntimeError, match=expected) as error:
            step(module("dtd"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "dead network"])
def test_cached_data_set_is_taken_without_a_network(svhn, monkeypatch, messages, offline):
    module().prepare_data()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    data = module()
    data.prepare_data()
    data.setup("test")
    assert len(data.test_dataloader().dataset) == 20
    assert sum("cannot be looked up" in line for line in messages) == 1


def test_what_hf_download_has_fetched_is_found_and_what_it_left_out_is_named(svhn, monkeypatch):
    """`hf download --include 'cropped_digits/train*'` on a machine with a network, the cache copied."""
    import huggingface_hub

    huggingface_hub.snapshot_download("ufldl-stanford/svhn", repo_type="dataset", allow_patterns=["cropped_digits/train*"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"no files test\*\.parquet .*the cache is all there is, because of HF_HUB_OFFLINE"):
        module().prepare_data()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.snapshot_download("ufldl-stanford/svhn", repo_type="dataset", allow_patterns=["cropped_digits/test*"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    module().prepare_data()


@pytest.mark.parametrize(
    ("where", "kind"), [("GET /api", 500), ("train-00001", 500), ("GET /datasets", "drop"), ("GET /datasets", "cut")]
)
def test_one_fault_is_got_over(svhn, where, kind):
    svhn.fail(where, kind)
    module().prepare_data()


def test_interrupted_download_goes_on_and_says_what_is_missing_without_a_network(svhn, monkeypatch):
    svhn.fail("train-00001", 500, times=99)
    with pytest.raises(RuntimeError, match=r"train-00001-of-00002.parquet: .*500"):
        module().prepare_data()
    endpoint = svhn.url
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match=r"svhn' \(Connect"):
        module().prepare_data()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    svhn.faults.clear()
    svhn.requests.clear()
    module().prepare_data()
    assert "cropped_digits/train-00001-of-00002.parquet" in svhn.fetched()
    assert "cropped_digits/train-00000-of-00002.parquet" not in svhn.fetched()


def test_revision_is_recorded_with_the_adapter(svhn, tmp_path):
    from fourier_moe import HeadOnly, describe_adapter
    from lightning_modules import AdaptationModule
    from lightning_modules.tasks import ImageClassification

    data = module()
    data.setup("test")
    model = AdaptationModule(ImageClassification(tiny=True), HeadOnly(), num_classes=10)
    model.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.trainer.datamodule = data
    model.configure_model()
    model.save_adapter(tmp_path / "adapter", {})
    assert describe_adapter(tmp_path / "adapter").task["data_revision"] == data.data_revision
    assert f"svhn at revision {data.data_revision}" in (tmp_path / "adapter/README.md").read_text()
