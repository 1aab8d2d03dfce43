"""Load and save Hugging Face models and their tokenizers."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from datamodules.shared.tokenizers import BYTES, is_path, load_tokenizer
from fourier_moe.errors import UserError
from fourier_moe.files.hub_files import HubError, Repository
from lightning_modules.tasks.backbones.hub_models import model_files
from lightning_modules.tasks.backbones.quantization import check_quantization, prepare_training, quantization_config
from lightning_modules.tasks.base import without_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_UNTRAINED_SEED = 0  # tiny models are always the same, so that their adapters can be loaded again


def check_model(model: str, dtype: str, quantization: str | None = None) -> None:
    """Check a model's name, dtype and quantization without loading anything.

    Raises:
        UserError: for a path without a model's config.json, an unknown dtype or quantization, or if bitsandbytes is missing.
    """
    if is_path(model) and not (Path(model).expanduser() / "config.json").is_file():
        raise UserError(f"model={model!r} has no config.json; give a name on the hub, or a Hugging Face model's directory")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    check_quantization(quantization)


def tokenizer_name(model: str, tiny: bool) -> str:
    """Return the argument of `load_tokenizer` for a model."""
    return BYTES if tiny else model


def load_fitting_tokenizer(name: str, model: str, tiny: bool) -> PreTrainedTokenizerBase:
    """Load the data's tokenizer, and check that its ids agree with the model's own tokenizer.

    Args:
        name: the data's tokenizer; see `load_tokenizer`.
        model: name or directory of the model; if it has no tokenizer, nothing is checked.
        tiny: whether the model is an untrained one that reads bytes.

    Raises:
        UserError: if the tokenizer cannot be loaded, or its tokens have other ids than in the model's own.
    """
    tokenizer = load_tokenizer(name)
    if name == tokenizer_name(model, tiny):
        return tokenizer
    try:
        own = load_tokenizer(tokenizer_name(model, tiny))
    except ValueError:  # a model without a tokenizer: the user must know which one fits
        return tokenizer
    ids, size = own.get_vocab(), len(own)
    others = [token for token, id_ in tokenizer.get_vocab().items() if id_ < size and ids.get(token) != id_]
    if others:
        raise UserError(
            f"tokenizer={name!r} belongs to another model: {len(others):,} of its {len(tokenizer):,} tokens have other ids in "
            f"the tokenizer of model={model!r}; leave tokenizer null for the model's own"
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, model: PreTrainedModel, model_name: str) -> None:
    """Check that a loaded model has an embedding for every token.

    Raises:
        UserError: if it does not.
    """
    known = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    if len(tokenizer) > known:
        raise UserError(
            f"tokenizer={name!r} has {len(tokenizer):,} tokens, model={model_name!r} has {known:,}; leave tokenizer null for "
            "the model's own"
        )


def fetch_model(model: str, *, look_up: bool = True) -> str | None:
    """Fetch the weights, config and tokenizer of a model on the hub; do nothing for a directory.

    Args:
        model: name on the hub, or directory.
        look_up: ask the hub for the newest version, not only for files that the cache does not have.

    Returns:
        The commit of the files; None for a directory.

    Raises:
        UserError: if they cannot be fetched.
    """
    if is_path(model):
        return None
    try:
        return Repository(model).fetch(model_files, rank_zero_info, look_up=look_up)[0].parent.name
    except HubError as error:
        raise not_loaded(model, error) from error


def load_sequence_classifier(
    model: str,
    num_labels: int,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    tiny: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a pretrained encoder or decoder with a new classification head.

    Args:
        model: name on the hub, or directory.
        num_labels: number of outputs of the head.
        dtype: dtype of the pretrained weights; with quantization, of activations and of the other weights.
        quantization: `int8` or `nf4` for the linear layers outside the head; None for no quantization.
        tiny: load an untrained model of the same architecture with 2 layers of width 256 and a vocabulary of bytes.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, ... of transformers; None for its own choice.

    Raises:
        UserError: if it cannot be loaded, or the architecture cannot classify sequences.
    """
    loaded = _load(
        AutoModelForSequenceClassification, model, dtype, quantization, tiny, attn_implementation, num_labels=num_labels
    )
    loaded.config.use_cache = False  # not needed, and activation checkpointing would fill the cache twice
    return loaded


def load_causal_language_model(
    model: str,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    tiny: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a pretrained decoder; arguments as for `load_sequence_classifier`.

    Raises:
        UserError: if it cannot be loaded, or is an encoder, which was not trained to continue text.
    """
    return _load(AutoModelForCausalLM, model, dtype, quantization, tiny, attn_implementation)


def save_hugging_face(model: Any, tokenizer: str, directory: Path, chat_template: Any = None) -> None:
    """Write model and tokenizer for `from_pretrained`, perhaps with another chat template. A byte tokenizer has no files."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:  # only one of two tied weights was updated
        model.config.tie_word_embeddings = False
    model.save_pretrained(directory)
    if tokenizer != BYTES:
        written = load_tokenizer(tokenizer)
        written.chat_template = chat_template or written.chat_template
        written.save_pretrained(directory)


def _load(
    auto_class: Any,
    model: str,
    dtype: str,
    quantization: str | None,
    tiny: bool,
    attn_implementation: str | None,
    **options: Any,
) -> PreTrainedModel:
    check_model(model, dtype, quantization)
    building: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if attn_implementation:
        building["attn_implementation"] = attn_implementation
    if tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_UNTRAINED_SEED)
            loaded = build_untrained(auto_class, model, _tiny_config(model, **options), building)
        if quantization:
            with tempfile.TemporaryDirectory() as directory:  # transformers quantizes only weights that it reads from files
                loaded.save_pretrained(directory)
                loaded = _load(auto_class, directory, dtype, quantization, False, attn_implementation)
        loaded.config._name_or_path = f"{Path(model).name}/tiny"
        return loaded
    commit = fetch_model(model, look_up=False)
    config = read_config(model, **options)
    if auto_class is AutoModelForCausalLM:
        _check_continues_text(model, config)
    if without_weights():
        return named(_empty(auto_class, model, config, building), model, commit)
    reading: dict[str, Any] = {"config": config, "local_files_only": True, **building}  # fetched above
    if quantization:
        with torch.device("meta"):
            skeleton = build_untrained(auto_class, model, config, building)
        reading["quantization_config"] = quantization_config(quantization, skeleton)
    try:
        with quiet_transformers():  # transformers reports the new head as "newly initialized"
            loaded, info = auto_class.from_pretrained(source(model), **reading, output_loading_info=True)
    except Exception as error:  # every file format has its own errors
        raise not_loaded(model, error) from error
    if quantization:
        prepare_training(loaded)
    has_new_head, body = auto_class is not AutoModelForCausalLM, f"{loaded.base_model_prefix}."
    check_complete(model, loaded, [name for name in info["missing_keys"] if name.startswith(body) or not has_new_head])
    return named(loaded, model, commit)


def build_untrained(auto_class: Any, model: str, config: PretrainedConfig, building: dict[str, Any]) -> PreTrainedModel:
    """Build an untrained model of a config."""
    try:
        built: PreTrainedModel = auto_class.from_config(config, **building)
    except (ImportError, ValueError) as error:  # attn_implementation is unknown, not installed, or not this model's
        raise not_loaded(model, error) from error
    return built


def _empty(auto_class: Any, model: str, config: PretrainedConfig, building: dict[str, Any]) -> PreTrainedModel:
    """Build a model on the meta device, which `from_pretrained` refuses."""
    loaded = build_untrained(auto_class, model, config, building)
    if loaded.can_generate():
        with suppress(OSError):  # a model without one has these settings in its config
            loaded.generation_config = GenerationConfig.from_pretrained(source(model), local_files_only=True)
    return loaded


def named(loaded: PreTrainedModel, model: str, commit: str | None) -> PreTrainedModel:
    """Set the name and commit that adapter files record, and train mode; from_pretrained returns models in eval mode."""
    loaded.config._name_or_path = Path(model).name if is_path(model) else model
    loaded.config._commit_hash = commit  # transformers no longer sets it
    return loaded.train()


def read_config(model: str, **options: Any) -> PretrainedConfig:
    """Read the config of a directory, or of a model that was fetched; `options` override its entries.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(source(model), local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise not_loaded(model, error) from error


def source(model: str) -> str:
    """Return what `from_pretrained` takes for a model."""
    return str(Path(model).expanduser()) if is_path(model) else model


def not_loaded(model: str, error: Exception) -> UserError:
    """Return the error of a model that cannot be loaded because of another error."""
    reason = " ".join(str(error).split())
    if re.search("attn_implementation|flash.?attention", reason, re.IGNORECASE):
        return UserError(f"attn_implementation of model={model!r}: {reason[:300]}")
    if isinstance(error, HubError) and error.remedy:
        return UserError(f"model={model!r} cannot be fetched: {reason}")
    reason = reason if isinstance(error, HubError) else reason[:300]
    return UserError(
        f"model={model!r} cannot be loaded ({reason}). Without a network: give the model's directory, or fill the Hugging Face "
        "cache (HF_HOME) on a machine that has one and copy it"
    )


def _check_continues_text(model: str, config: PretrainedConfig) -> None:
    """Refuse an encoder such as BERT, which transformers would load as a decoder although it was not trained as one."""
    if config.architectures and not set(config.architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            f"model={model!r} is a {', '.join(config.architectures)}, which does not continue text; CausalLanguageModel needs "
            "a decoder such as LlamaForCausalLM"
        )


def check_complete(model: str, loaded: PreTrainedModel, missing: Collection[str]) -> None:
    """Refuse missing weights outside a new head, which transformers initializes randomly with only a log message."""
    random = sorted(missing)
    if not random:
        return
    share = f"{len(random)} of {len(loaded.state_dict())} weights are not in its files ({', '.join(random[:3])}, ...)"
    if all(name.startswith(f"{loaded.base_model_prefix}.pooler.") for name in random):
        rank_zero_warn(f"model={model!r}: {share}: its pooler is random and is not trained")  # RoBERTa was trained without one
    else:
        raise UserError(f"model={model!r} is incomplete or damaged: {share}")


def architecture(model: str) -> str:
    """Return transformers' name of the architecture that a name or directory stands for (`llama`), without a network.

    Raises:
        UserError: if a name does not tell it.
    """
    if is_path(model):
        return str(read_config(model).model_type)
    name = model.lower()
    model_type = max((kind for kind in CONFIG_MAPPING if kind in name), key=len, default="")
    if not model_type:
        raise UserError(f"tiny=True cannot tell the architecture of model={model!r} from its name; give its directory")
    return model_type


def _tiny_config(model: str, **options: Any) -> PretrainedConfig:
    """Return a config of the architecture that a name or directory stands for, with 2 layers of width 256."""
    model_type = architecture(model)
    config = CONFIG_MAPPING[model_type]()
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 384,
        "max_position_embeddings": 2048,
        "layer_types": None,
    }
    present: dict[str, Any] = {key: value for key, value in sizes.items() if hasattr(config, key)}
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return CONFIG_MAPPING[model_type](**present, **tokens, **options)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors only."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
