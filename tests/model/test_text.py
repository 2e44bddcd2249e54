"""The text encoder: official and diffusers files give what the official arithmetic gives, and the cache gives it again without them."""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import random
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.umt5 import (
    BUCKETS,
    DIM,
    END,
    FFN,
    HEAD_DIM,
    HEADS,
    LAYERS,
    TEXT_LEN,
    UNKNOWN,
    VOCABULARY,
    WORDS,
    State,
    official_state,
    write_official,
    write_tokenizer,
)
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from arcopo_fast.errors import UserError
from arcopo_fast.model import text
from arcopo_fast.model.checkpoints import read_container
from arcopo_fast.model.families import OFFICIAL
from arcopo_fast.model.text import CachedTextEncoder, TextEncoderFiles, UMT5TextEncoder, clean_prompt, load_umt5

# Files in the published formats -------------------------------------------------------------------------------------------------------


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


def write_diffusers(directory: Path, state: State, shard: str = "12KB") -> Path:
    write_tokenizer(directory / "tokenizer")
    transformers_model(state).save_pretrained(directory / "text_encoder", max_shard_size=shard)
    return directory


LAYOUTS = {"official": write_official, "diffusers": write_diffusers, "unsharded": lambda d, s: write_diffusers(d, s, "1GB")}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sentence(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


def tokens_of(directory: Path, prompts: list[str], text_len: int) -> tuple[Tensor, Tensor]:
    """ids and mask [B, text_len] as the official code asks transformers for them."""
    file = next(directory.rglob("tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    options = {"padding": "max_length", "truncation": True, "max_length": text_len, "add_special_tokens": True, "return_tensors": "pt"}
    encoded = tokenizer(prompts, **options)
    return encoded.input_ids, encoded.attention_mask


def load(directory: Path, text_len: int = TEXT_LEN, dtype: torch.dtype = torch.float32) -> UMT5TextEncoder:
    return UMT5TextEncoder.load(TextEncoderFiles.find(directory), text_len=text_len, dtype=dtype)


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


def one_line(error: pytest.ExceptionInfo[UserError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"


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


# The cache ----------------------------------------------------------------------------------------------------------------------------


class Letters:
    """In the place of an encoder: a row for each letter, and a record of what it was asked."""

    def __init__(self, asked: list[str] | None = None) -> None:
        self.asked = [] if asked is None else asked

    def encode(self, prompt: str) -> Tensor:
        self.asked.append(prompt)
        return torch.tensor([[ord(letter), ord(letter) ** 0.5, 1.0] for letter in prompt], dtype=torch.bfloat16)


def letters(directory: Path, asked: list[str], **options: object) -> CachedTextEncoder:
    return CachedTextEncoder(lambda: Letters(asked), **({"fingerprint": "letters", "text_len": 40, "directory": directory} | options))  # type: ignore[arg-type, return-value]


def refuse() -> UMT5TextEncoder:
    raise AssertionError("the encoder is loaded, although every embedding is there")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cache_gives_what_the_encoder_gives_and_loads_it_once(
    tmp_path: Path, layout: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = LAYOUTS[layout](tmp_path / "wan", official_state())
    prompts = [sentence(4), sentence(11), ""]
    expected = load(directory, dtype=dtype)(prompts)
    cache = tmp_path / "cache"
    encoder = CachedTextEncoder.from_pretrained(directory, text_len=TEXT_LEN, dtype=dtype, directory=cache)
    assert not cache.exists()

    encoder.encode_all([*prompts, prompts[0], f"  {prompts[1]}\n"])

    assert "3 new prompts" in capsys.readouterr().err
    assert len(list(cache.iterdir())) == 3
    sizes = []
    for path in cache.iterdir():
        with safe_open(path, framework="pt") as file:
            rows, prompt = file.get_tensor("rows"), file.metadata()["prompt"]
        assert rows.shape == (len(prompt.split()) + 1, DIM) and rows.dtype == dtype
        sizes.append(len(rows))
    assert sorted(sizes) == [1, 5, 12]

    encoder.load = refuse
    assert torch.equal(encoder(prompts), expected)
    assert torch.equal(encoder([prompts[1], prompts[1]]), expected[[1, 1]])
    encoder.encode_all(prompts)
    assert capsys.readouterr().err == ""
    with pytest.raises(AssertionError, match="is loaded"):
        encoder([sentence(6)])


def test_only_new_prompts_are_encoded(tmp_path: Path) -> None:
    asked: list[str] = []
    encoder = letters(tmp_path, asked)
    encoder(["bat", "cow"])
    both = encoder(["cow", "eel", "cow", " eel "])
    assert asked == ["bat", "cow", "eel"]
    assert both.shape == (4, 40, 3) and torch.equal(both[0], both[2]) and torch.equal(both[1], both[3])
    assert both[1, 0, 0] == ord("e") and not both[:, 3:].any()


def test_encoders_and_settings_do_not_mix(tmp_path: Path) -> None:
    first, others = [], []
    letters(tmp_path, first)(["bat"])
    for options in ({"fingerprint": "numbers"}, {"text_len": 41}):
        letters(tmp_path, others, **options)(["bat"])
    assert first == ["bat"] and others == ["bat", "bat"]

    state = official_state()
    made = {name: write(tmp_path / name, state) for name, write in LAYOUTS.items()}
    key = {name: TextEncoderFiles.find(directory).fingerprint() for name, directory in made.items()}
    assert len(set(key.values())) == 3
    for name, directory in made.items():
        moved = Path(shutil.copytree(directory, tmp_path / "moved" / name))
        assert TextEncoderFiles.find(moved).fingerprint() == key[name]
        files = TextEncoderFiles.find(moved)
        for file in (files.weight_files[-1], files.tokenizer):
            content = bytearray(file.read_bytes())
            content[random.randrange(len(content))] ^= 1
            file.write_bytes(content)
            assert TextEncoderFiles.find(moved).fingerprint() != key[name]
            key[name] = TextEncoderFiles.find(moved).fingerprint()
    options = [CachedTextEncoder.from_pretrained(made["official"], dtype=dtype).fingerprint for dtype in (torch.bfloat16, torch.float32)]
    assert options[0] != options[1]


def test_the_fingerprint_of_a_large_file_reads_a_little_everywhere(tmp_path: Path) -> None:
    """Weights of one size that differ throughout differ; at most 4 MiB of each file are read."""
    directory = write_official(tmp_path / "wan", official_state())
    files = TextEncoderFiles.find(directory)
    keys = set()
    for _ in range(2):
        files.weights.write_bytes(random.randbytes(6 << 20))
        keys.add(files.fingerprint())
    assert len(keys) == 2
    content = bytearray(files.weights.read_bytes())
    for end in (0, -1):  # the first and the last byte are among the samples
        content[end] ^= 1
        files.weights.write_bytes(content)
        keys.add(files.fingerprint())
    assert len(keys) == 4


def test_any_flipped_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []
    encoder = letters(tmp_path, asked)
    expected = encoder(["owl"])
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    data = len(content) - 3 * 3 * 2
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= random.randrange(1, 256)
        path.write_bytes(damaged)
        asked.clear()
        caplog.clear()
        assert torch.equal(encoder(["owl"]), expected), position
        assert (asked == ["owl"]) == ("broken" in caplog.text)
        if position >= data or position < 8:
            assert asked, position


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"a page of something else"])
def test_a_broken_file_is_made_again(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []
    encoder = letters(tmp_path, asked)
    expected = encoder(["owl"])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for broken in (content, whole[: len(whole) // 2], whole + content if content else whole[:-1]):
        path.write_bytes(broken)
        asked.clear()
        encoder.encode_all(["owl"])
        assert asked == ["owl"] and str(path) in caplog.text
        assert torch.equal(encoder(["owl"]), expected) and asked == ["owl"]


@pytest.mark.parametrize("changed", [{"dtype": torch.float16}, {"shape": (1, 9)}, {"prompt": "bee"}])
def test_rows_of_another_kind_or_prompt_are_not_taken(tmp_path: Path, changed: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    """Every byte of the tensor is as it was written, with its checksum; what the bytes mean is not."""
    asked: list[str] = []
    encoder = letters(tmp_path, asked)
    expected = encoder([prompt := str(changed.get("prompt", "owl"))])
    with safe_open(encoder._file(prompt), framework="pt") as file:
        rows, metadata = file.get_tensor("rows"), file.metadata()
    rows = rows.view(changed.get("dtype", rows.dtype)).reshape(changed.get("shape", rows.shape))  # type: ignore[call-overload]
    save_file({"rows": rows}, encoder._file("owl"), metadata)
    asked.clear()
    again = encoder(["owl"])
    assert asked == ["owl"] and "checksum" in caplog.text
    assert torch.equal(again, expected) or prompt != "owl"


def _encode_words(directory: Path, words: list[str]) -> None:
    for word in words:
        letters(directory, []).encode_all([word])


def test_processes_share_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Several that write the same prompts at once, while another reads: nobody ever sees a broken file."""
    words = [word * 3 for word in WORDS]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_encode_words, args=(tmp_path, random.sample(words, len(words)))) for _ in range(3)]
    for writer in writers:
        writer.start()
    reader = letters(tmp_path, [])
    while any(writer.is_alive() for writer in writers):
        for word in words:
            rows = reader._read(word)
            assert rows is None or torch.equal(rows, Letters().encode(word))
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    asked: list[str] = []
    letters(tmp_path, asked)(words)
    assert not asked and not caplog.records
    assert len(list(tmp_path.iterdir())) == len(words)


def test_what_was_encoded_before_a_stop_is_kept(tmp_path: Path) -> None:
    class Stopping(Letters):
        def encode(self, prompt: str) -> Tensor:
            if prompt == "cow":
                raise KeyboardInterrupt
            return super().encode(prompt)

    encoder = letters(tmp_path, [])
    encoder.load = Stopping  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        encoder.encode_all(["bat", "cow", "eel"])
    asked: list[str] = []
    letters(tmp_path, asked)(["bat", "cow", "eel"])
    assert asked == ["cow", "eel"]


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_the_encoder_is_gone_afterwards(tmp_path: Path, no_collector: None) -> None:
    directory = write_official(tmp_path / "wan", official_state())
    encoder = CachedTextEncoder.from_pretrained(directory, text_len=TEXT_LEN, directory=tmp_path / "cache")
    load, made = encoder.load, []

    def watched() -> UMT5TextEncoder:
        loaded = load()
        made.append(weakref.ref(loaded.model))
        return loaded

    encoder.load = watched
    encoder.encode_all([sentence(3), sentence(4)])
    encoder([sentence(5)])
    assert [reference() for reference in made] == [None, None]


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as error:
        letters(tmp_path / "file" / "cache", [])(["owl"])
    one_line(error, tmp_path / "file" / "cache", "another cache directory")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_bytes = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        write_bytes(path, content[: len(content) // 2])
        full()

    for place, failing in ((Path, half), (text.os, full)):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
            patch.setattr(place, "write_bytes" if place is Path else "replace", failing)
            letters(tmp_path / "cache", [])(["owl"])
        assert not list((tmp_path / "cache").iterdir())


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoder = CachedTextEncoder(refuse, fingerprint="none")
    assert encoder.directory == tmp_path / "arcopo_fast" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert text.cache_directory() == tmp_path / "home" / ".cache" / "arcopo_fast" / "text"
