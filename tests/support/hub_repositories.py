"""Tiny repositories for `hub_server`, with the file names and schemas of the real ones."""

import functools
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from PIL import Image

from support.hub_server import Repository


def parquet(features: datasets.Features, columns: dict[str, list]) -> bytes:
    table = datasets.Dataset.from_dict(columns, features=features).with_format("arrow")[:]
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@functools.cache
def _image(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (red, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def image_rows(num_classes: int, a_class: int, red: int = 200) -> bytes:
    """Parquet of `a_class` images of every class, all of one color."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {index}" for index in range(num_classes)])}
    )
    labels = [index for index in range(num_classes) for _ in range(a_class)]
    return parquet(features, {"image": [{"bytes": _image(red), "path": None}] * len(labels), "label": labels})


def image_repository(num_classes: int, splits: Sequence[str] = ("train", "test"), folder: str = "data") -> Repository:
    """`folder/train-00000-of-00002.parquet` and so on: two parts of train, one of each other split, with two images a class."""
    files = {f"{folder}/{split}-00000-of-00001.parquet": image_rows(num_classes, 2) for split in splits if split != "train"}
    parts = {f"{folder}/train-0000{part}-of-00002.parquet": image_rows(num_classes, 1, 90 * part) for part in range(2)}
    return Repository({"README.md": b"---\nlicense: mit\n---\n", **files, **parts})


def cars() -> Repository:
    """Stanford Cars of the hub: nine splits, of which two are wanted."""
    corrupted = ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter")
    repository = image_repository(196, ("train", "test"))
    repository.files |= {f"data/{split}-00000-of-00001.parquet": b"not to be fetched" for split in corrupted}
    return repository


def glue(tasks: Sequence[str] = ("cola", "rte")) -> Repository:
    sizes = {"train": 40, "validation": 10, "test": 6}
    sentences = {"cola": ("sentence",), "rte": ("sentence1", "sentence2")}
    names = {"cola": ("unacceptable", "acceptable"), "rte": ("entailment", "not_entailment")}
    files = {}
    for task in tasks:
        features = {name: datasets.Value("string") for name in sentences[task]}
        features |= {"label": datasets.ClassLabel(names=list(names[task])), "idx": datasets.Value("int32")}
        for split, size in sizes.items():
            columns = {
                name: [f"The {split} sentence number {row} is short." for row in range(size)] for name in sentences[task]
            }
            columns |= {"label": [-1 if split == "test" else row % 2 for row in range(size)], "idx": list(range(size))}
            files[f"{task}/{split}-00000-of-00001.parquet"] = parquet(datasets.Features(features), columns)
    return Repository({"README.md": b"---\nlicense: other\n---\n", **files})


TINY_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 128, "head_width": 64, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


@functools.cache
def clip() -> Repository:
    """OpenAI's CLIP as timm keeps it, for open_clip's `ViT-B-32-quickgelu` once that name means TINY_CLIP."""
    import open_clip
    import torch
    from safetensors.torch import save

    torch.manual_seed(5)
    model = open_clip.CLIP(**TINY_CLIP)
    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    return Repository(
        {"open_clip_config.json": json.dumps({"model_cfg": TINY_CLIP}).encode(), "open_clip_model.safetensors": content}
    )


@functools.cache
def roberta() -> Repository:
    """RoBERTa with a byte-level tokenizer of its own kind, and files of other libraries that are not to be fetched."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    torch.manual_seed(5)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(["The sentence number 1 is short."], vocab_size=300, special_tokens=special)
        tokenizer.save_model(folder)
        RobertaTokenizerFast.from_pretrained(folder, model_max_length=512).save_pretrained(folder)
        config = RobertaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=514,
            type_vocab_size=1,
        )
        RobertaForMaskedLM(config).save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return Repository({**files, "pytorch_model.bin": b"old", "tf_model.h5": b"other", "onnx/model.onnx": b"other"})
