"""The cache of embeddings gives what the encoder gives, without it, whatever happens to its files and whoever shares them."""

from __future__ import annotations

import gc
import multiprocessing
import random
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.errors import one_line
from support.umt5 import (
    DIM,
    LAYOUTS,
    TEXT_LEN,
    WORDS,
    load,
    official_state,
    sentence,
    write_official,
)
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.model import text
from arcopo_fast.model.text import CachedTextEncoder, TextEncoderFiles, UMT5TextEncoder

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
