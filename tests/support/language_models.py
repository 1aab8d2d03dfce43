"""A tiny LLaMA with adapters that do something, and sums as a benchmark."""

import re
from typing import NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from datamodules.shared.data_module import BaseDataModule
from datamodules.shared.tokenizers import load_tokenizer
from fourier_moe import FourierMoEConfig, SpectralExperts, TopKRouter, inject
from lightning_modules import AdaptationModule
from lightning_modules.tasks import CausalLanguageModel, GenerationSettings
from lightning_modules.tasks.generation import generate

ADAPTER = FourierMoEConfig(
    targets=["q_proj", "v_proj", "down_proj"], num_coefficients=32, num_experts=4, scaling=16, seed=0, balance_weight=0.5
)
TOKENIZER = load_tokenizer("bytes")
PAIRS = [(1, 2), (300, 4), (56, 7890), (9, 9)]
GREEDY = GenerationSettings(12)


def tiny_llama():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=384, num_key_value_heads=2, **sizes, **tokens))
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from ties between tokens
    return model.eval()


def adapted_llama():
    model = tiny_llama()
    inject(model, ADAPTER)
    move_experts(model)
    return model


def move_experts(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SpectralExperts):
                module.coefficients.normal_(generator=generator)
            elif isinstance(module, TopKRouter):
                module.weight.mul_(4)


class Grade(NamedTuple):
    extracted: str | None
    correct: bool
    strict_extracted: str | None
    strict_correct: bool


class Sums:
    """The last number is the answer; strictly, the one after `is`."""

    name = "sums"

    def grade(self, output, answer):
        numbers = re.findall(r"\d+", output)
        strict = re.search(r"is (\d+)", output)
        last = numbers[-1] if numbers else None
        stated = strict.group(1) if strict else None
        return Grade(last, last == answer, stated, stated == answer)


def example(left, right, choices=False):
    answers = [str(left + right), str(left + right + 1)]
    return {
        "id": f"{left}+{right}",
        "prompt": f"What is {left} + {right}?\n",
        "answer": answers[0],
        "benchmark": Sums(),
        "choices": tuple(answers) if choices else (),
        "responses": tuple(f"it is {answer}" for answer in answers) if choices else (),
    }


def pad(rows, value, left=False, extra=0):
    width = max(map(len, rows)) + extra
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)])


def collate(examples, extra=0, known=True):
    """A batch; `extra` columns of padding more than needed; without the known response if it is not `known`."""
    prompts = [TOKENIZER(e["prompt"], add_special_tokens=False)["input_ids"] for e in examples]
    responses = [TOKENIZER(f"it is {e['answer']}")["input_ids"] for e in examples]
    batch = {name: [e[name] for e in examples] for name in examples[0]}
    batch["prompt_ids"] = pad(prompts, 0, left=True, extra=extra)
    batch["prompt_mask"] = pad([[1] * len(p) for p in prompts], 0, left=True, extra=extra)
    if known:
        both = list(zip(prompts, responses, strict=True))
        batch["input_ids"] = pad([p + r for p, r in both], 0, extra=extra)
        batch["attention_mask"] = pad([[1] * len(p + r) for p, r in both], 0, extra=extra)
        batch["labels"] = pad([[-100] * len(p) + r for p, r in both], -100, extra=extra)
    return batch


SETS = {"small": [(1, 2), (3, 4), (5, 60)], "large": [(700, 8), (9, 10), (11, 1200), (13, 14), (15, 16)]}


class SumsData(BaseDataModule):
    """Two sets of sums; as many as `sets` says, and no name for a single one."""

    evaluation_notes = {"large": "leaked"}  # noqa: RUF012

    def __init__(self, sets=SETS, choices=False, named=True):
        super().__init__()
        loaders = {
            name: DataLoader([example(*pair, choices) for pair in pairs], batch_size=2, collate_fn=collate)
            for name, pairs in sets.items()
        }
        self.loaders = loaders if named else next(iter(loaders.values()))

    def train_dataloader(self):
        return self.loaders["small"]

    def _evaluation(self):
        return self.loaders

    val_dataloader = test_dataloader = predict_dataloader = _evaluation


class TinyLanguageModel(CausalLanguageModel):
    """CausalLanguageModel on the tiny LLaMA."""

    def __init__(self, **options):
        super().__init__("tiny-llama", tiny=True, **options)

    def build(self, num_classes=None, class_names=None):
        self.tokenizer = TOKENIZER
        self.model = tiny_llama()
        return self.model


def task_with(model, **options):
    task = TinyLanguageModel(**options)
    task.build()
    task.model = model
    return task


def answers(model, batch, settings=GREEDY):
    return generate(model, TOKENIZER, batch["prompt_ids"], batch["prompt_mask"], settings)


def language_module(**options):
    return AdaptationModule(TinyLanguageModel(**options), ADAPTER)


def language_trainer(directory, *callbacks, **options):
    return L.Trainer(
        default_root_dir=directory,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
