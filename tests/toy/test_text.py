"""The toy text encoder: words become rows, the rest is exactly zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arcopo_fast.errors import UserError
from arcopo_fast.toy import data
from arcopo_fast.toy.text import FILE_NAME, ToyTextEncoder


@pytest.fixture
def encoder() -> ToyTextEncoder:
    return ToyTextEncoder.for_captions(data.all_captions(), seed=int(torch.randint(2**31, ())))


def test_words_are_rows_of_the_table_and_padding_is_zero(encoder: ToyTextEncoder) -> None:
    prompts = ["a red circle moving left", "blue", "a green cross moving down"]
    embeddings = encoder(prompts)
    assert embeddings.shape == (3, encoder.text_len, encoder.text_dim) == (3, 8, 32) and embeddings.dtype == torch.float32
    for prompt, rows in zip(prompts, embeddings):
        words = prompt.split()
        for position, word in enumerate(words):
            assert torch.equal(rows[position], encoder.table[encoder.vocabulary.index(word)])
        assert (rows[len(words) :] == 0).all()


def test_words_are_told_apart(encoder: ToyTextEncoder) -> None:
    gram = encoder.table @ encoder.table.T / encoder.text_dim
    torch.testing.assert_close(gram, torch.eye(len(encoder.vocabulary)), atol=5e-3, rtol=0)
    flat = encoder(data.all_captions()).flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(torch.inf).min() > 1


def test_saving_and_loading_gives_the_same_encoder(encoder: ToyTextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "text")
    loaded = ToyTextEncoder.from_pretrained(tmp_path / "text")
    assert loaded.vocabulary == encoder.vocabulary and loaded.text_len == encoder.text_len
    prompts = data.all_captions()
    assert torch.equal(loaded(prompts), encoder(prompts))
    assert [file.name for file in (tmp_path / "text").iterdir()] == [FILE_NAME]


def test_what_it_cannot_encode_gets_a_clear_message(encoder: ToyTextEncoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'dog'.*circle"):
        encoder(["a red circle moving left", "a red dog moving left"])
    with pytest.raises(UserError, match="9 words"):
        encoder(["red " * 9])
    with pytest.raises(UserError, match="cannot read"):
        ToyTextEncoder.from_pretrained(tmp_path / "absent")
    (tmp_path / FILE_NAME).write_bytes(b"not a safetensors file, whatever its name says")
    with pytest.raises(UserError, match="cannot read"):
        ToyTextEncoder.from_pretrained(tmp_path)
