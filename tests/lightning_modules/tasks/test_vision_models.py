"""ImageClassification on tiny models of Hugging Face and timm, from directories as their users have them."""

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.hub_server import Repository
from transformers import AutoImageProcessor, AutoModelForImageClassification

from datamodules import ImageDataModule, ImageMixtureDataModule
from datamodules.images import MixtureTask
from fourier_moe import FourierMoEConfig, LoRAConfig, adapters, describe_adapter, inject, load_adapter, save_adapter
from fourier_moe.errors import UserError
from fourier_moe.serving.merge import merge_adapters
from lightning_modules.tasks import ImageClassification

SIZE, NAMES = 32, ["red_fox", "dog", "cat"]
HALF, CLIP_MEAN = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**LAYERS, "image_size": SIZE, "patch_size": 8}
SQUARE, CROP = {"height": SIZE, "width": SIZE}, {"size": {"shortest_edge": 40}, "crop_size": {"height": SIZE, "width": SIZE}}
MODELS = {
    "vit": ("ViTForImageClassification", {**VISION, "num_labels": 7}, "ViTImageProcessor", {"size": SQUARE}),
    "dinov2": ("Dinov2Model", VISION, "BitImageProcessor", CROP),
    "dinov3": ("DINOv3ViTModel", VISION, None, {}),
    "siglip": ("SiglipModel", {"vision_config": VISION, "text_config": LAYERS}, "SiglipImageProcessor", {"size": SQUARE}),
    "clip": ("CLIPModel", {"vision_config": VISION, "text_config": LAYERS}, "CLIPImageProcessor", CROP),
    "deit": ("DeiTForImageClassificationWithTeacher", {**VISION, "num_labels": 7}, None, {}),
    "swin": (
        "SwinModel",
        {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        None,
        {},
    ),
}
INPUTS = {
    "vit": (SIZE, HALF, HALF),
    "dinov3": (SIZE, None, None),
    "siglip": (SIZE, HALF, HALF),
    "deit": (SIZE, None, None),
    "swin": (SIZE, None, None),
    "timm": (SIZE, HALF, HALF),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Writes a pretrained model, once, and returns its directory."""
    root = tmp_path_factory.mktemp("models")

    def write(name):
        path = root / name
        if path.exists():
            return path
        torch.manual_seed(5)
        if name == "timm":
            sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
            timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), path, safe_serialization=True)
            return path
        model, options, processor, settings = MODELS[name]
        config = getattr(transformers, model).config_class(**options)
        getattr(transformers, model)(config).save_pretrained(path)
        if processor is not None:
            getattr(transformers, processor)(**settings).save_pretrained(path)
        return path

    return write


@pytest.fixture
def images():
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def config(task, **options):
    return FourierMoEConfig(
        **{"targets": ["q_proj", "v_proj"], "num_coefficients": 32, "num_experts": 2, "head": task.head_names, **options}
    )


@pytest.mark.parametrize("name", [*MODELS, "timm"])
def test_directory_gives_a_frozen_model_with_a_new_head_and_its_own_input(directory, images, name):
    path = directory(name)
    task = ImageClassification(str(path))
    assert task.library.input() == INPUTS.get(name, (SIZE, CLIP_MEAN, (0.26862954, 0.26130258, 0.27577711)))
    model = task.build(None, NAMES)
    assert all(module.training for module in model.modules())
    stored = load_file(path / "model.safetensors")
    if name != "timm":
        stored = getattr(transformers, MODELS[name][0]).from_pretrained(path).state_dict()
    loaded = {key: value for key, value in model.state_dict().items() if key.partition(".")[0] not in ("classifier", "head")}
    assert loaded
    for key, value in loaded.items():
        inside = key.removeprefix("backbone.")
        assert torch.equal(value, next(v for end, v in stored.items() if end.endswith(inside) or inside.endswith(end))), key
    report = inject(model, config(task))
    assert {name.rpartition(".")[2] for name in adapters(model)} == {"q_proj", "v_proj"}
    assert report.trained["head"] == sum(p.numel() for p in model.get_submodule(task.head_names[0]).parameters())
    with torch.autocast("cpu", torch.bfloat16):
        logits = task(images)
    assert (logits.shape, logits.dtype) == ((4, 3), torch.float32)
    task(images).square().sum().backward()
    assert all(adapter.experts.coefficients.grad.abs().sum() > 0 for adapter in adapters(model).values())
    assert ImageClassification(str(path)).forward_flops() > 1e5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "LevitForImageClassificationWithTeacher",
            {"hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "key_dim": [8] * 3, "depths": [1] * 3},
        ),
        ("DINOv3ConvNextModel", {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}),
        ("SiglipVisionModel", VISION),
    ],
)
def test_family_with_two_heads_or_with_stages_or_a_tower_by_itself_classifies(images, tmp_path, kind, options):
    family = getattr(transformers, kind)
    family(family.config_class(**{**options, "image_size": SIZE})).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    task = ImageClassification(str(tmp_path))
    model = task.build(3)
    assert "Teacher" not in type(model).__name__
    for name, value in model.state_dict().items():
        assert name.startswith("classifier") or any(torch.equal(value, of_file) for of_file in stored), name
    assert task(images).shape == (4, 3)


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        ("MobileViTImageProcessor", {"do_flip_channel_order": False}, ((0.0,) * 3, (1.0,) * 3)),  # its do_normalize is null
        ("ViTImageProcessor", {"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)),
        ("EfficientNetImageProcessor", {"include_top": False}, (HALF, HALF)),
        ("MobileViTImageProcessor", {}, r"MobileViTImageProcessor .*\(do_flip_channel_order=True\)"),
        ("EfficientNetImageProcessor", {}, "include_top=True"),
        (
            "EfficientNetImageProcessor",
            {"include_top": False, "rescale_offset": True, "rescale_factor": 1 / 127.5},
            r"rescale_offset=True, rescale_factor=0\.0078",
        ),
        ("ViTImageProcessor", {"rescale_factor": 1.0}, r"\(rescale_factor=1.0\)"),
        ("Siglip2ImageProcessor", {}, r"\(without a setting\)"),  # it makes patches
    ],
)
def test_colors_are_those_of_the_image_processor_or_refused(directory, tmp_path, processor, settings, expected):
    (tmp_path / "config.json").write_bytes((directory("vit") / "config.json").read_bytes())
    getattr(transformers, processor)(**settings).save_pretrained(tmp_path)
    if isinstance(expected, tuple):
        assert ImageClassification(str(tmp_path)).library.input()[1:] == expected
        return
    with pytest.raises(UserError, match=expected):  # there are no weights to load
        ImageClassification(str(tmp_path)).tell_data(ImageDataModule("cars", synthetic=True))


@pytest.mark.parametrize("name", ["vit", "timm", "dinov3"])
def test_adapter_is_loaded_again(directory, images, tmp_path, name):
    task = ImageClassification(str(directory(name)))
    model = task.build(3)
    inject(model, config(task))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path)
    assert describe_adapter(tmp_path).backbone == name
    again = ImageClassification(str(directory(name)))
    load_adapter(again.build(3), tmp_path)
    model.eval(), again.model.eval()
    with torch.no_grad():
        assert torch.equal(again(images), task(images))


@pytest.mark.parametrize("name", ["vit", "siglip", "deit"])
def test_code_of_an_adapters_card_builds_its_model(directory, images, tmp_path, monkeypatch, name):
    task = ImageClassification(str(directory(name)))
    inject(task.build(3), config(task, targets=["q_proj", "out_proj" if name == "siglip" else "v_proj"]))
    with torch.no_grad():
        task.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    task.model.config._name_or_path = str(directory(name))
    save_adapter(task.model, tmp_path)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec((tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0], space)
    with torch.no_grad():
        torch.testing.assert_close(space["model"].eval()(images).logits, task.model.eval()(images).logits)


@pytest.mark.parametrize("name", ["vit", "timm", "dinov3"])
def test_merged_model_is_loaded_by_its_own_library(directory, images, tmp_path, name):
    task = ImageClassification(str(directory(name)))
    inject(task.build(None, NAMES), LoRAConfig(targets=["q_proj"], r=2, head=task.head_names))
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    task.model.eval()
    with torch.no_grad():
        expected = task(images)
        merge_adapters(task.model)
        task.save_model(tmp_path / "merged", NAMES)
        if name == "timm":
            model = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
            assert json.loads((tmp_path / "merged/config.json").read_text())["label_names"] == NAMES
            found = model(images)
        elif name == "vit":
            model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
            assert model.config.id2label == dict(enumerate(NAMES))
            assert AutoImageProcessor.from_pretrained(tmp_path / "merged").image_mean in (HALF, [*HALF])
            found = model(images).logits
        else:
            features = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()(images).pooler_output
            head = load_file(tmp_path / "merged/head.safetensors")
            found = features @ head["weight"].T + head["bias"]
            assert json.loads((tmp_path / "merged/head.json").read_text())["class_names"] == NAMES
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_positions_are_interpolated_for_another_size_and_timms_fixed_ones_are_refused(directory):
    images = torch.randn(1, 3, 48, 48)
    for name in ("vit", "clip", "dinov2"):
        task = ImageClassification(str(directory(name)), image_size=48)
        task.build(3)
        assert task.library.input().image_size == 48
        assert task(images).shape == (1, 3)
    task = ImageClassification(str(directory("timm")))
    task.build(3)
    with pytest.raises(UserError, match=r"images are 48 x 48, .* needs 32 x 32; set data.*image_size=32, or model.*=48"):
        task(images)
    task = ImageClassification("timm:test_vit", None, image_size=48)
    task.build(3)
    assert task(images).shape == (1, 3)


def test_untrained_model_is_the_same_whatever_the_seed(directory):
    for model in (str(directory("vit")), "timm:test_vit"):
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            task = ImageClassification(model, None)
            states.append(task.build(3).state_dict())
        equal = {key for key, value in states[0].items() if torch.equal(value, states[1][key])}
        assert states[0].keys() - equal == {f"{task.head_names[0]}.weight", f"{task.head_names[0]}.bias"}
        assert task.model.state_dict()[next(key for key in equal if key.endswith("q_proj.weight") or "qkv.weight" in key)].std()


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_damaged_directory_is_refused(directory, tmp_path, name):
    for path in directory(name).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state.pop(next(key for key in state if "layer" in key or "blocks" in key))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is incomplete or damaged: 1 of|cannot be loaded: .*Missing key"):
        ImageClassification(str(tmp_path)).build(3)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_timms_weights_come_from_a_file_with_any_head_or_none(tmp_path, num_classes):
    torch.manual_seed(1)
    state = timm.create_model("test_vit", num_classes=num_classes).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    model = ImageClassification("timm:test_vit", str(tmp_path / "mine.safetensors")).build(3)
    assert model.backbone_name == "test_vit/mine.safetensors"
    assert torch.equal(model.state_dict()["blocks.5.mlp.fc1.weight"], state["blocks.5.mlp.fc1.weight"])
    state.pop("blocks.0.mlp.fc1.bias")
    save_file(state, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=r"cannot be loaded: .*Missing key"):
        ImageClassification("timm:test_vit", str(tmp_path / "mine.safetensors")).build(3)


@pytest.mark.parametrize("model", ["timm:test_vit", "timm/test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k"])
def test_timms_weights_come_from_the_hub_with_their_commit(hub, tmp_path, model):
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "files", safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    hub.models["timm/test_vit.r160_in1k"] = Repository({**files, "pytorch_model.bin": b"old"})
    task = ImageClassification(model)
    task.fetch()
    built = task.build(3)
    assert "pytorch_model.bin" not in hub.fetched()
    stored = load_file(tmp_path / "files/model.safetensors")
    assert torch.equal(built.state_dict()["blocks.0.attn.qkv.weight"], stored["blocks.0.attn.qkv.weight"])
    inject(built, config(task))
    save_adapter(built, tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert 'base_model: "timm/test_vit.r160_in1k"' in card
    assert hub.models["timm/test_vit.r160_in1k"].commit in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "google/vit", "pretrained": "openai"}, "'openai' is for open_clip and timm; .* set pretrained to default"),
        ({"model": "google/vit", "head": "zero_shot"}, "'zero_shot' needs an open_clip model"),
        ({"model": "./missing"}, r"model='./missing' has no config.json"),
        ({"model": "timm:vit_smal"}, "'timm:vit_smal' is not a timm model; near names: .*vit_"),
        ({"model": "timm:test_vit.mine"}, "its tags: r160_in1k"),
        ({"model": "timm:test_vit", "pretrained": "openai"}, "must be the path of a weights file, default for"),
        ({"model": "timm/test_vit.r160_in1k", "pretrained": "openai"}, "must be default for the model's own"),
        ({"model": "timm:vit_giant_patch14_224"}, "has no weights on the hub"),
    ],
)
def test_wrong_argument_is_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(UserError, match=message):
        ImageClassification(**arguments)


def test_model_that_does_not_read_images_is_refused(tmp_path):
    transformers.BertConfig(**LAYERS).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a BertModel, which does not classify images"):
        ImageClassification(str(tmp_path), None).build(3)


# ---------------------------------------------------------------- data and runs


def test_data_follow_the_model_where_their_arguments_are_null(directory, tmp_path):
    told = ImageClassification(str(directory("vit")))
    white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    data = ImageDataModule("cars", num_workers=0, synthetic=True)
    assert data.image_size == 224
    told.tell_data(data)
    assert data.image_size == SIZE
    assert data.normalize(white).flatten().tolist() == [1.0] * 3
    data.setup("validate")
    loaded = data.datasets("validation")
    told.tell_data(data)  # of the next run in this process: nothing is read again
    assert data.datasets("validation") == loaded
    assert ImageDataModule("cars", synthetic=True, std=HALF).follow_model(SIZE) == [
        f"data.mean={CLIP_MEAN} is used; the model's own is unknown"
    ]
    assert next(iter(data.val_dataloader()))["image"].shape[1:] == (3, SIZE, SIZE)
    own = {"image_size": 16, "std": (1.0, 1.0, 1.0)}
    assert ImageDataModule("cars", synthetic=True, **own).follow_model(SIZE, HALF, HALF) == [
        "data.image_size=16 is used; the model's own is 32",
        "data.std=(1.0, 1.0, 1.0) is used; the model's own is (0.5, 0.5, 0.5)",
    ]
    mixture = ImageMixtureDataModule({"cars": MixtureTask(), "dtd": MixtureTask()}, synthetic=True, num_workers=0, mean=HALF)
    assert mixture.follow_model(image_size=SIZE, mean=CLIP_MEAN, std=HALF) == [
        f"data.mean={HALF} is used; the model's own is {CLIP_MEAN}"
    ]
    mixture.setup("fit")
    assert next(iter(mixture.train_dataloader()))["image"].shape[1:] == (3, SIZE, SIZE)


def test_config_with_the_recipe_trains_resumes_and_tests(directory, run):
    words = ("--config", "configs/clip_eurosat.yaml", "--config", "configs/recipes/vision_model.yaml")
    small = ("--data.synthetic", "true", "--data.batch_size", "8", "--data.num_workers", "0", "--trainer.precision", "32-true")
    words += (*small, "--model.task.model", str(directory("timm")), "--model.adapter.init_args.num_coefficients", "64")
    words += ("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")
    cli = run("fit", *words)
    assert cli.datamodule.image_size == SIZE
    directory_of_run = Path(cli.trainer.log_dir)
    assert describe_adapter(directory_of_run / "adapter").backbone == "timm"
    assert "ImageClassification" in (directory_of_run / "adapter/README.md").read_text()
    resumed = run("fit", *words, "--trainer.max_epochs", "2", "--ckpt_path", str(directory_of_run))
    assert resumed.trainer.global_step == 4
    tested = run("test", *words, "--model.adapter_path", str(directory_of_run / "adapter"))
    assert 0 <= float(tested.trainer.callback_metrics["test/accuracy"]) <= 1
