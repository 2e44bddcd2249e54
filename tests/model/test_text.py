"""The text encoder: official and diffusers files give what the official arithmetic gives."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from support.errors import one_line
from support.umt5 import (
    BUCKETS,
    DIM,
    END,
    HEAD_DIM,
    HEADS,
    LAYERS,
    LAYOUTS,
    TEXT_LEN,
    UNKNOWN,
    VOCABULARY,
    State,
    load,
    official_state,
    sentence,
    transformers_model,
    write_diffusers,
    write_official,
)
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from arcopo_fast.errors import UserError
from arcopo_fast.model import text
from arcopo_fast.model.checkpoints import read_container
from arcopo_fast.model.families import OFFICIAL
from arcopo_fast.model.text import TextEncoderFiles, clean_prompt, load_umt5

# Files in the published formats -------------------------------------------------------------------------------------------------------


def official_forward(state: State, ids: Tensor, mask: Tensor) -> Tensor:
    """The official encoder in float64, from its description: ids and mask [B, L] -> [B, L, DIM]."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T

    def bucket(distance: int) -> int:
        """Half of the buckets for each direction; of those, half for single distances, and half logarithmic up to 128."""
        half = BUCKETS // 2
        near, far = half // 2, abs(distance)
        if far >= near:
            far = min(half - 1, near + int(math.log(far / near) / math.log(128 / near) * (half - near)))
        return far + (half if distance > 0 else 0)

    length = ids.shape[1]
    buckets = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])
    x = state["token_embedding.weight"][ids]
    for index in range(LAYERS):
        name = f"blocks.{index}"
        a = norm(x, f"{name}.norm1")
        q, k, v = (linear(a, f"{name}.attn.{part}").unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in "qkv")
        scores = q @ k.transpose(-1, -2) + state[f"{name}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.attn.o")
        a = norm(x, f"{name}.norm2")
        gate = functional.gelu(linear(a, f"{name}.ffn.gate.0"), approximate="tanh")
        x = x + linear(gate * linear(a, f"{name}.ffn.fc1"), f"{name}.ffn.fc2")
    return norm(x, "norm")


def tokens_of(directory: Path, prompts: list[str], text_len: int) -> tuple[Tensor, Tensor]:
    """ids and mask [B, text_len] as the official code asks transformers for them."""
    file = next(directory.rglob("tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    options = {"padding": "max_length", "truncation": True, "max_length": text_len, "add_special_tokens": True, "return_tensors": "pt"}
    encoded = tokenizer(prompts, **options)
    return encoded.input_ids, encoded.attention_mask


# Embeddings ---------------------------------------------------------------------------------------------------------------------------


def test_every_layout_gives_the_official_embeddings(tmp_path: Path, layout: str) -> None:
    state = official_state()
    directory = LAYOUTS[layout](tmp_path / "wan", state)
    prompts = [sentence(5), sentence(140), "", sentence(1)]
    ids, mask = tokens_of(directory, prompts, TEXT_LEN)
    expected = official_forward(state, ids, mask) * mask[..., None]
    with torch.no_grad():
        direct = transformers_model(state)(ids, attention_mask=mask).last_hidden_state * mask[..., None]

    embeddings = load(directory)(prompts)

    assert embeddings.shape == (4, TEXT_LEN, DIM) and embeddings.dtype == torch.float32
    for row, (prompt, tokens) in enumerate(zip(prompts, mask.sum(1).tolist())):
        assert tokens == len(prompt.split()) + 1
        assert (embeddings[row, :tokens].abs().amax(-1) > 0).all()
        assert torch.equal(embeddings[row, tokens:], torch.zeros(TEXT_LEN - tokens, DIM))
    torch.testing.assert_close(embeddings.double(), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(embeddings, direct, rtol=0, atol=2e-4)


def test_an_embedding_does_not_depend_on_the_prompts_beside_it(tmp_path: Path) -> None:
    encoder = load(write_official(tmp_path / "wan", official_state()))
    prompts = [sentence(7), sentence(90), sentence(2)]
    together = encoder(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], encoder([prompt])[0])


def test_a_long_prompt_is_cut_and_keeps_its_end_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = official_state()
    directory = write_official(tmp_path / "wan", state)
    encoder = load(directory, text_len=9)
    fits, long = sentence(8), sentence(30)
    ids, mask = tokens_of(directory, [fits, long], 9)
    assert mask.all() and ids[:, -1].tolist() == [END, END]
    with caplog.at_level(logging.WARNING):
        whole = encoder([fits])
        assert not caplog.records
        cut = encoder([long])
    assert long[:20] in caplog.text and "longer than 9 tokens" in caplog.text
    expected = official_forward(state, ids, mask)
    torch.testing.assert_close(torch.cat([whole, cut]).double(), expected, rtol=0, atol=2e-4)


def test_the_tokenizer_is_what_its_file_says(tmp_path: Path) -> None:
    """Normaliser included, although tokenizer_config.json names a class that has none."""
    directory = write_official(tmp_path / "wan", official_state())
    prompt = "BAKE ﬁ　ｆｏ"
    ids, mask = tokens_of(directory, [prompt], 20)
    own = text.load_tokenizer(TextEncoderFiles.find(directory).tokenizer, 20).encode(prompt).ids
    assert own == ids[0, : mask.sum()].tolist() and UNKNOWN not in own


def test_bfloat16_weights_are_used_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of the official file, which is mapped, are the parameters: no copy. The two names of the embedding are one tensor."""
    read: State = {}
    monkeypatch.setattr(text, "read_container", lambda path: read.update(read_container(path)) or read)
    state = official_state(torch.bfloat16)
    directory = write_official(tmp_path / "wan", state)
    model = load_umt5(TextEncoderFiles.find(directory), dtype=torch.bfloat16)
    assert {parameter.data_ptr() for parameter in model.parameters()} == {tensor.data_ptr() for tensor in read.values()}
    maps = Path("/proc/self/maps")
    if maps.exists():
        areas = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(OFFICIAL.text)]
        assert all(any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in areas) for tensor in read.values())
    assert model.shared is model.encoder.embed_tokens
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(tensor.numel() for tensor in state.values())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())

    prompt = sentence(10)
    rows = load(directory, dtype=torch.bfloat16).encode(prompt)
    assert rows.dtype == torch.bfloat16
    ids, mask = tokens_of(directory, [prompt], TEXT_LEN)
    expected = official_forward(state, ids, mask)[0, : len(rows)]
    with torch.no_grad():
        direct = transformers_model(state).bfloat16()(ids, attention_mask=mask).last_hidden_state[0, : len(rows)]
    assert 0 < (rows.double() - expected).square().mean() < 4 * (direct.double() - expected).square().mean()  # twice in root mean square


def test_weights_of_another_dtype_are_converted(tmp_path: Path) -> None:
    directory = write_diffusers(tmp_path / "wan", official_state())
    model = load_umt5(TextEncoderFiles.find(directory), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_names_and_sizes_of_the_published_encoder() -> None:
    """24 blocks of 10 tensors, the table and the last norm, all of them the network's, and the sizes of UMT5-XXL from shapes alone."""
    shapes = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for block in range(24):
        inner = {f"attn.{part}": (4096, 4096) for part in "qkvo"} | {"norm1": (4096,), "norm2": (4096,)}
        inner |= {"ffn.gate.0": (10240, 4096), "ffn.fc1": (10240, 4096), "ffn.fc2": (4096, 10240), "pos_embedding.embedding": (32, 64)}
        shapes |= {f"blocks.{block}.{name}.weight": shape for name, shape in inner.items()}
    state = {text.transformers_name(name): torch.empty(shape, device="meta") for name, shape in shapes.items()}
    sizes = text._sizes(state, Path("file"))
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config.from_dict(sizes))
    own = {name: tensor.shape for name, tensor in model.named_parameters()}
    assert len(own) == 242 and own == {name: tensor.shape for name, tensor in state.items()}


# What is wrong with files -------------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_names_are_listed(tmp_path: Path) -> None:
    state = official_state()
    del state["blocks.1.attn.o.weight"]
    state["blocks.0.attn.bias"] = torch.randn(3)
    state["norm.weight"] = torch.randn(DIM + 1)
    directory = write_official(tmp_path / "wan", state)
    with pytest.raises(UserError) as error:
        load(directory)
    names = "1 missing (encoder.block.1.layer.0.SelfAttention.o.weight)", "1 unexpected (blocks.0.attn.bias)"
    one_line(error, OFFICIAL.text, *names, f"encoder.final_layer_norm.weight [{DIM + 1}] instead of [{DIM}]")


@pytest.mark.parametrize("name", sorted(official_state()))
def test_no_official_name_can_be_missing(tmp_path: Path, name: str) -> None:
    state = official_state()
    del state[name]
    with pytest.raises(UserError, match=text.transformers_name(name).replace("relative_attention_bias", ".*")):
        load_umt5(TextEncoderFiles.find(write_official(tmp_path / "wan", state)))


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    directory = write_diffusers(tmp_path / "wan", official_state())
    shards = TextEncoderFiles.find(directory).weight_files
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(UserError) as error:
        load(directory)
    one_line(error, directory / "text_encoder", "missing")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        TextEncoderFiles.find(tmp_path)
    one_line(error, tmp_path, OFFICIAL.text, "11.4 GB", "text_encoder/", "Wan-AI/Wan2.1-T2V-1.3B")

    directory = write_official(tmp_path / "other", {"head.weight": torch.randn(3, 3)})
    with pytest.raises(UserError) as error:
        load(directory)
    one_line(error, OFFICIAL.text, "not a UMT5 encoder", "shared.weight", "head.weight")

    (directory / OFFICIAL.text).write_bytes(random.randbytes(500))
    with pytest.raises(UserError) as error:
        load(directory)
    one_line(error, OFFICIAL.text, "damaged")

    config = write_diffusers(tmp_path / "diffusers", official_state()) / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
    with pytest.raises(UserError) as error:
        load(tmp_path / "diffusers")
    one_line(error, config, "describes a t5")

    for file in (tmp_path / "diffusers" / "text_encoder").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no weights"):
        load(tmp_path / "diffusers")


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    state = official_state()
    endless = write_official(tmp_path / "endless", state, end=False)
    with pytest.raises(UserError, match="no end token"):
        load(endless)
    large = write_official(tmp_path / "large", state, unused=VOCABULARY)
    with pytest.raises(UserError, match="do not belong together"):
        load(large)
    file = large / "google" / "umt5-xxl" / "tokenizer.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(UserError, match="not a tokenizer"):
        load(large)
    file.unlink()
    with pytest.raises(UserError, match="tokenizer.json does not exist"):
        load(large)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    state = official_state()
    state["token_embedding.weight"][:] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        load(write_official(tmp_path / "wan", state))([sentence(3)])


# Prompts ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A cat\n\twalks \r\n home  ", "A cat walks home"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp;amp; Jerry", "Tom & Jerry"),  # once by ftfy, twice by the standard library
        ("&lt;b&gt; caf&eacute; don&#39;t", "<b> café don't"),
        ("a <b> &amp;amp; c", "a <b> & c"),  # ftfy leaves entities beside a tag alone
        ("“It’s” a ‘test’", "\"It's\" a 'test'"),
        ("cafÃ©", "café"),
        ("cafe\u0301", "café"),
        ("ﬁre ｆｕｌｌ\u3000width", "fire full width"),
        ("no\u00a0break&nbsp;space\u2028line", "no break space line"),
        ("\x1b[31mred\x1b[0m\x07", "red"),
        ("一只猫 在雪地里", "一只猫 在雪地里"),
        (" \n ", ""),
    ],
)
def test_prompts_are_cleaned_as_officially(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned


def test_without_ftfy_nothing_is_cleaned_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match="pip install ftfy"):
        clean_prompt("a cat")
