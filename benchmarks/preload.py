"""Every library that a method or model needs; the fork server of memory.py imports it before it forks."""

import open_clip.transformer  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.roberta.modeling_roberta  # noqa: F401

import benchmarks.memory  # noqa: F401
