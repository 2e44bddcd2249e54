"""Small UMT5 encoders with random weights, in the form of the official Wan2.1 files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from arcopo_fast.model.text import TextEncoderFiles, UMT5TextEncoder

State = dict[str, Tensor]

# No two sizes are equal, so that none can be taken for another.
VOCABULARY, DIM, HEADS, HEAD_DIM, FFN, LAYERS, BUCKETS = 83, 24, 3, 5, 40, 2, 12
TEXT_LEN = 150  # beyond the largest distance that relative positions tell apart, 128
WORDS = [first + last for first in ("ba", "ce", "di", "fo", "gu", "he") for last in ("", "ke", "li", "mo", "nu", "pa", "re", "to")]
END, UNKNOWN = 1, 2


def official_state(dtype: torch.dtype = torch.float32) -> State:
    """Random weights under the names of the official encoder, of sizes at which every part shows in the result, even a norm's epsilon."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * columns**-0.5

    state = {"token_embedding.weight": 0.05 * torch.randn(VOCABULARY, DIM), "norm.weight": 1 + 0.3 * torch.randn(DIM)}
    for block in range(LAYERS):
        state |= {
            f"blocks.{block}.{name}": tensor
            for name, tensor in {
                "norm1.weight": 1 + 0.3 * torch.randn(DIM),
                "attn.q.weight": matrix(HEADS * HEAD_DIM, DIM),
                "attn.k.weight": matrix(HEADS * HEAD_DIM, DIM),
                "attn.v.weight": matrix(HEADS * HEAD_DIM, DIM),
                "attn.o.weight": matrix(DIM, HEADS * HEAD_DIM),
                "pos_embedding.embedding.weight": torch.randn(BUCKETS, HEADS),
                "norm2.weight": 1 + 0.3 * torch.randn(DIM),
                "ffn.gate.0.weight": matrix(FFN, DIM),
                "ffn.fc1.weight": matrix(FFN, DIM),
                "ffn.fc2.weight": matrix(DIM, FFN),
            }.items()
        }
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write_tokenizer(directory: Path, *, end: bool = True, unused: int = 0) -> None:
    """A Unigram tokenizer like google/umt5-xxl's: pieces with scores, "▁" for a space, a normaliser, an end token."""
    directory.mkdir(parents=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces += [(f"▁{word}", -4.0 - number / 100) for number, word in enumerate(WORDS)]
    pieces += [(f"unused{number}", -9.0) for number in range(unused)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))


def write_official(directory: Path, state: State, **tokenizer: Any) -> Path:
    write_tokenizer(directory / "google" / "umt5-xxl", **tokenizer)
    torch.save(state, directory / "models_t5_umt5-xxl-enc-bf16.pth")
    return directory


def transformers_model(state: State) -> UMT5EncoderModel:
    """transformers' encoder with the weights put where they belong one by one, through its modules and not through names."""
    sizes = {"vocab_size": VOCABULARY, "d_model": DIM, "num_heads": HEADS, "d_kv": HEAD_DIM, "d_ff": FFN, "num_layers": LAYERS}
    config = UMT5Config(**sizes, relative_attention_num_buckets=BUCKETS)
    model = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        model.shared.weight.copy_(state["token_embedding.weight"])
        model.encoder.final_layer_norm.weight.copy_(state["norm.weight"])
        for index, block in enumerate(model.encoder.block):
            attention, feed_forward = block.layer
            places = {
                "norm1": attention.layer_norm,
                "attn.q": attention.SelfAttention.q,
                "attn.k": attention.SelfAttention.k,
                "attn.v": attention.SelfAttention.v,
                "attn.o": attention.SelfAttention.o,
                "pos_embedding.embedding": attention.SelfAttention.relative_attention_bias,
                "norm2": feed_forward.layer_norm,
                "ffn.gate.0": feed_forward.DenseReluDense.wi_0,
                "ffn.fc1": feed_forward.DenseReluDense.wi_1,
                "ffn.fc2": feed_forward.DenseReluDense.wo,
            }
            for name, module in places.items():
                module.weight.copy_(state[f"blocks.{index}.{name}.weight"])
    return model


def write_diffusers(directory: Path, state: State, shard: str = "12KB") -> Path:
    write_tokenizer(directory / "tokenizer")
    transformers_model(state).save_pretrained(directory / "text_encoder", max_shard_size=shard)
    return directory


LAYOUTS = {"official": write_official, "diffusers": write_diffusers, "unsharded": lambda d, s: write_diffusers(d, s, "1GB")}


def sentence(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


def load(directory: Path, text_len: int = TEXT_LEN, dtype: torch.dtype = torch.float32) -> UMT5TextEncoder:
    return UMT5TextEncoder.load(TextEncoderFiles.find(directory), text_len=text_len, dtype=dtype)
