"""ImageClassification on tiny open_clip models."""

import dataclasses
import json
import re

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hub_repositories
from torch.nn import functional as F

from fourier_moe import FourierMoEConfig, HeadOnly, adapters, inject
from lightning_modules.tasks import ImageClassification
from lightning_modules.tasks.backbones.open_clip import check_model, load_open_clip

WIDTH, EMBEDDING, SIZE = 32, 16, 16
NAMES = ["red_fox", "dog", "cat"]


def write_config(directory, name="tiny_test_clip", vision=None, **text):
    """An open_clip model config; the text tower takes CLIP's own tokens."""
    vision = vision or {"image_size": SIZE, "patch_size": 8, "width": WIDTH, "layers": 1, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, **text}
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": EMBEDDING, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def images():
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- heads


def test_linear_head_is_on_the_pooled_output_before_clips_projection(config, images):
    model = ImageClassification(config, pretrained=None).build(num_classes=5).eval()
    clip = load_open_clip(config, None).eval()
    assert (model.head.in_features, model.head.out_features) == (WIDTH, 5)
    with torch.no_grad():
        pooled = model.backbone(images)
        torch.testing.assert_close(pooled @ clip.visual.proj, clip.encode_image(images))
        torch.testing.assert_close(model(images), F.linear(pooled, model.head.weight, model.head.bias))


def test_tower_without_that_projection_has_the_head_on_its_output(tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    task = ImageClassification(write_config(tmp_path, "tiny_test_resnet", vision), pretrained=None)
    assert task.build(num_classes=5).head.in_features == EMBEDDING
    assert task(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("method", [HeadOnly(), FourierMoEConfig(targets=["fc1"], num_coefficients=16, num_experts=2)])
def test_of_a_timm_tower_only_the_tasks_head_is_trained(tmp_path, method):
    """timm towers of open_clip have a module called head, too."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    task = ImageClassification(write_config(tmp_path, "tiny_test_timm", vision), pretrained=None)
    model = task.build(num_classes=5)
    names = dict(model.backbone.named_parameters())
    assert "head.proj.weight" in names
    report = inject(model, dataclasses.replace(method, head=task.head_names))
    assert (model.head.in_features, model.head.out_features) == (EMBEDDING, 5)
    assert report.trained["head"] == EMBEDDING * 5 + 5
    of_adapters = {f"{name}.{part}" for name in adapters(model) for part in ("experts.coefficients", "router.weight")}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"} | of_adapters
    assert bool(of_adapters) == isinstance(method, FourierMoEConfig)
    assert not names["head.proj.weight"].requires_grad
    assert task(torch.randn(2, 3, 160, 160)).shape == (2, 5)


@pytest.mark.parametrize("head", ["linear", "zero_shot"])
def test_tower_is_built_in_training_mode_and_drops_patches(tmp_path, head):
    vision = {"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": 1, "head_width": 16, "patch_dropout": 0.5}
    task = ImageClassification(write_config(tmp_path, "tiny_test_dropout", vision), pretrained=None, head=head)
    model, images = task.build(num_classes=3, class_names=NAMES), torch.randn(2, 3, 32, 32)
    assert {module.training for module in model.modules()} == {True}
    torch.manual_seed(0)
    assert not torch.allclose(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_zero_shot_text_is_encoded_without_dropout_whatever_the_mode(config, monkeypatch):
    modes = []
    encode_text = open_clip.CLIP.encode_text

    def remember(self, *args, **options):
        modes.append(self.training)
        return encode_text(self, *args, **options)

    monkeypatch.setattr(open_clip.CLIP, "encode_text", remember)
    ImageClassification(config, pretrained=None, head="zero_shot").build(num_classes=None, class_names=NAMES)
    assert modes == [False] * 3


@pytest.mark.parametrize("template", ["a {} in {braces}", "{} {0}", "100% {}", "a {!r} of {}"])
def test_braces_other_than_the_class_names_place_stay_as_they_are(config, monkeypatch, template):
    prompts = []
    get_tokenizer = open_clip.get_tokenizer

    def remember(name):
        tokenizer = get_tokenizer(name)
        return lambda texts: prompts.append(texts) or tokenizer(texts)

    monkeypatch.setattr(open_clip, "get_tokenizer", remember)
    task = ImageClassification(config, pretrained=None, head="zero_shot", templates=[template])
    task.build(num_classes=None, class_names=NAMES)
    before, after = template.split("{}", 1)
    assert prompts == [[f"{before}{name}{after}"] for name in ("red fox", "dog", "cat")]


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["a photo of a {}.", "art of the {}"]])
def test_zero_shot_head_gives_clips_own_logits(config, images, templates):
    task = ImageClassification(config, pretrained=None, head="zero_shot", templates=templates)
    model = task.build(num_classes=None, class_names=NAMES).eval()
    clip, tokenizer = load_open_clip(config, None).eval(), open_clip.get_tokenizer("tiny_test_clip")
    with torch.no_grad():
        per_template = []
        for template in templates:
            prompts = tokenizer([template.format(name) for name in ("red fox", "dog", "cat")])
            image_features, text_features, scale = clip(images, prompts)
            per_template.append(text_features)
        text_features = F.normalize(torch.stack(per_template).mean(0), dim=-1)
        expected = scale * image_features @ text_features.T
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert expected.std(1).min() > 1e-3  # the classes do differ
    assert task.num_classes == 3


@pytest.mark.parametrize("head", ["linear", "zero_shot"])
def test_head_computes_in_float32_under_mixed_precision(config, head):
    """In bfloat16 the logits of alike classes are equal, and an example's class is the first of them."""
    task = ImageClassification(config, pretrained=None, head=head)
    model = task.build(num_classes=None, class_names=[f"class {number}" for number in range(50)]).eval()
    images = torch.randn(64, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, rounded = model(images), model.head(model.backbone(images))
        features = model.backbone(images).float()
    assert logits.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(logits, model.head(features))

    def tied(values):
        return int((values.topk(2).values.diff() == 0).sum())

    assert tied(logits) == 0
    assert tied(rounded) > 0 or head == "linear"


def test_zero_shot_head_needs_class_names(config):
    with pytest.raises(ValueError, match="needs class names"):
        ImageClassification(config, pretrained=None, head="zero_shot").build(num_classes=3)


@pytest.mark.parametrize("head", ["linear", "zero_shot"])
def test_saved_model_and_head_give_the_same_logits(config, images, tmp_path, head):
    task = ImageClassification(config, pretrained=None, head=head)
    model, saved = task.build(None, NAMES).eval(), tmp_path / "saved"
    task.save_model(saved, NAMES)
    clip = open_clip.create_model(f"local-dir:{saved}").eval()
    weights, description = load_file(saved / "head.safetensors"), json.loads((saved / "head.json").read_text())
    assert (description["kind"], description["class_names"]) == (head, NAMES)
    with torch.no_grad():
        if head == "linear":
            clip.visual.proj = None
            found = F.linear(clip.visual(images), weights["weight"], weights["bias"])
        else:
            cosines = F.linear(clip.encode_image(images, normalize=True), F.normalize(weights["weight"], dim=-1))
            found = description["logit_scale"] * cosines
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)


def test_number_of_classes_comes_from_the_names_and_must_be_known(config):
    assert ImageClassification(config, pretrained=None).build(None, NAMES).head.out_features == 3
    with pytest.raises(ValueError, match="num_classes is unknown"):
        ImageClassification(config, pretrained=None).build(None)


def test_accuracy_counts_images_and_balanced_accuracy_counts_classes(config):
    task = ImageClassification(config, pretrained=None)
    task.build(num_classes=3)
    metrics = task.new_metrics()
    metrics.update(torch.eye(3)[[0, 0, 0, 1, 1]], torch.tensor([0, 0, 0, 1, 2]))
    assert {name: round(float(value), 4) for name, value in metrics.compute().items()} == {
        "accuracy": 0.8,
        "balanced_accuracy": 0.6667,
    }


# ---------------------------------------------------------------- untrained, tiny and resized towers


def test_untrained_tower_is_the_same_whatever_the_seed_and_leaves_the_random_numbers_alone(config):
    states, draws = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(load_open_clip(config, None).state_dict())
        draws.append(torch.rand(3))
        torch.manual_seed(seed)
        assert torch.equal(draws[-1], torch.rand(3))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert states[0]["visual.conv1.weight"].std() > 0
    assert not torch.equal(*draws)


def test_tiny_keeps_patches_and_image_size_and_shrinks_the_rest():
    model = ImageClassification("ViT-B-16-quickgelu", pretrained="openai", tiny=True).build(4)
    assert model.backbone.image_size == (224, 224)
    assert model.backbone.conv1.kernel_size == (16, 16)
    assert len(model.backbone.transformer.resblocks) == 2
    assert model.head.in_features == 256
    assert model.backbone_name == "ViT-B-16-quickgelu/tiny"


def test_tiny_is_for_vision_transformers():
    with pytest.raises(ValueError, match="tiny=True needs a CLIP with a plain vision transformer, and model='RN50'"):
        load_open_clip("RN50", None, tiny=True)


def test_image_size_resizes_the_tower_and_wrong_images_are_an_error_that_names_both_settings(config, images):
    model = ImageClassification(config, pretrained=None, image_size=24).build(4)
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 4)
    with pytest.raises(
        ValueError, match=r"images are 16 x 16, .* needs 24 x 24; set data.*image_size=24, or model.*image_size=16"
    ):
        model(images)


# ---------------------------------------------------------------- weights


def test_weights_file_of_the_tower_or_of_the_whole_clip_is_loaded(config, tmp_path, images):
    clip = load_open_clip(config, None)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.mul_(1.5)
    save_file(clip.visual.state_dict(), tmp_path / "tower.safetensors")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    clip.eval().visual.proj = None
    for file in ("tower.safetensors", "clip.pt"):
        model = ImageClassification(config, pretrained=str(tmp_path / file)).build(4).eval()
        with torch.no_grad():
            torch.testing.assert_close(model.backbone(images), clip.visual(images))
        assert model.backbone_name == f"tiny_test_clip/{file}"


def test_weights_of_another_model_are_an_error_that_names_the_file(config, tmp_path):
    vision = {"image_size": SIZE, "patch_size": 8, "width": 48, "layers": 1, "head_width": 16}
    other = load_open_clip(write_config(tmp_path, "tiny_test_wide", vision), None)
    for file, state in (("tower.pt", other.visual.state_dict()), ("clip.pt", other.state_dict())):
        torch.save(state, tmp_path / file)
        with pytest.raises(ValueError, match=rf"{file}' does not fit the model: .*"):
            load_open_clip(config, str(tmp_path / file))


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_file_that_is_no_weights_file_is_an_error_that_names_it(config, tmp_path, file):
    (tmp_path / file).write_text("<html>404</html>")
    with pytest.raises(ValueError, match=rf"{file}' cannot be read as a weights file"):
        load_open_clip(config, str(tmp_path / file))


def test_weights_that_cannot_be_fetched_are_an_error_that_names_the_ways_without_a_network(hub):
    hub.models["timm/vit_base_patch32_clip_224.openai"] = hub_repositories.clip()
    hub.fail("GET /timm/", 500, times=99)
    with pytest.raises(ValueError) as error:
        load_open_clip("ViT-B-32-quickgelu", "openai")
    assert "'openai'" in str(error.value)
    assert "open_clip_model.safetensors: HfHubHTTPError" in str(error.value)
    assert "500 Internal Server Error" in str(error.value)
    assert "open_clip_pytorch_model.bin" not in str(error.value)
    assert "pretrained" in str(error.value)
    assert "HF_HOME" in str(error.value)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ViT-B-23"}, r"model='ViT-B-23' is not an open_clip model; near names: .*ViT-B-32"),
        ({"model": "nowhere/clip.json", "pretrained": None}, r"'nowhere/clip\.json' looks like the path .* no such file"),
        ({"pretrained": "opnai"}, r"pretrained='opnai' is neither a file nor a tag of .*'ViT-B-32-quickgelu'; tags: openai"),
        ({"pretrained": "weights/clip.pt"}, r"'weights/clip\.pt' is neither a file nor a tag"),
        ({"model": "ViT-B-32"}, r"'openai' of model='ViT-B-32' was trained with QuickGELU, .* use model='ViT-B-32-quickgelu'"),
        ({"head": "cosine"}, "head='cosine' must be 'linear' or 'zero_shot'"),
        ({"templates": ["a photo"]}, r"templates=\['a photo'\] must be prompts with {}"),
        ({"templates": []}, r"templates=\[\] must be prompts"),
    ],
)
def test_wrong_argument_is_an_error_before_anything_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match=message):
        ImageClassification(**arguments)


def test_model_that_an_activation_error_recommends_is_accepted():
    recommended = set()
    for model, tag in open_clip.list_pretrained():
        try:
            check_model(model, tag)
        except ValueError as error:
            recommended.add((re.search(r"use model='(.*)'", str(error))[1], tag))
    assert ("ViT-B-32-quickgelu", "openai") in recommended
    for model, tag in recommended:
        check_model(model, tag)
