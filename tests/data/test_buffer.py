"""The replay buffer: entries are whole, every damage is seen and named, and processes that share one make each entry once."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.buffers import POLICY, RECIPE, file_of, filled, group, names, same

from arcopo_fast.data.buffer import BrokenEntry, Buffer
from arcopo_fast.errors import UserError
from arcopo_fast.storage.identity import values_digest

# Entries ---------------------------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    made = filled(tmp_path / "deep" / "buffer", 5)
    buffer = Buffer.open(tmp_path / "deep" / "buffer", POLICY)
    assert len(buffer) == 5 and buffer.indices == [0, 1, 2, 3, 4]
    assert (buffer.policy, buffer.recipe) == (POLICY, RECIPE)
    for entry in buffer.entries():
        tensors, metadata = made[entry.index]
        assert entry.metadata == metadata and entry.tensors.keys() == tensors.keys() and len(entry.tensors) == len(tensors)
        assert all(same(entry.tensors[name], tensor) for name, tensor in tensors.items())
        assert "nonsense" not in entry.tensors
    order = random.sample(range(5), 3)
    assert [entry.index for entry in buffer.entries(order)] == order
    with pytest.raises(BrokenEntry, match=r"000005.safetensors is missing"):
        buffer.read(5)


def test_views_gradients_and_shared_memory_are_stored(tmp_path: Path) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    first, second = x.split(2)
    tensors = {"x": x, "again": x, "first": first, "second": second, "turned": x.T, "expanded": x[:1].expand(3, 6), "strided": x[:, ::2]}
    buffer = Buffer.create(tmp_path, POLICY, RECIPE)
    for index in buffer.missing(1):
        buffer.write(index, tensors, {})
    read = buffer.read(0).tensors
    assert all(same(read[name], tensor.detach()) for name, tensor in tensors.items())


def test_a_reader_cannot_change_the_file(tmp_path: Path) -> None:
    ((tensors, _),) = filled(tmp_path, 1)
    before = file_of(tmp_path, 0).read_bytes()
    Buffer.open(tmp_path, POLICY).read(0).tensors["torch.float32"].mul_(2)
    assert file_of(tmp_path, 0).read_bytes() == before
    assert same(Buffer.open(tmp_path, POLICY).read(0).tensors["torch.float32"], tensors["torch.float32"])


def test_the_same_group_is_the_same_file(tmp_path: Path) -> None:
    tensors, metadata = group()
    for name in ("a", "b"):
        buffer = Buffer.create(tmp_path / name, POLICY, RECIPE)
        for index in buffer.missing(1):
            buffer.write(index, tensors, metadata)
    assert file_of(tmp_path / "a", 0).read_bytes() == file_of(tmp_path / "b", 0).read_bytes()


def test_only_the_holder_of_a_claim_writes_and_it_has_to(tmp_path: Path) -> None:
    buffer = Buffer.create(tmp_path, POLICY, RECIPE)
    with pytest.raises(ValueError, match="not claimed"):
        buffer.write(0, *group())
    with pytest.raises(RuntimeError, match="claimed and not written"):
        list(buffer.missing(2))
    for index in buffer.missing(2):
        with pytest.raises(ValueError, match="not claimed"):
            buffer.write(1 - index, *group())
        buffer.write(index, *group())
        with pytest.raises(ValueError, match="there already"):
            buffer.write(index, *group())
    assert list(buffer.missing(2)) == []
    assert [next(buffer.missing(groups)) for groups in (3, 30)] == [2, 2]  # an iteration that is not finished claims nothing any more
    assert names(tmp_path) == ["000000.safetensors", "000001.safetensors"]


# Damage ----------------------------------------------------------------------------------------------------------------------------


def damage_of(path: Path) -> str:
    """How entry 1 of 2 is refused, whether it is noticed at opening or at reading."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        buffer = Buffer.open(path, POLICY)
        assert [entry.index for entry in buffer.entries()] == [0]
    assert buffer.indices == [0] and len(caught) == 1
    with pytest.raises(BrokenEntry) as error:
        Buffer(path, json.loads((path / "buffer.json").read_text())).read(1)
    assert str(error.value) in str(caught[0].message)
    return str(error.value)


def test_a_change_of_any_byte_is_seen_and_named(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    buffer = Buffer.create(tmp_path, POLICY, RECIPE)
    for index in buffer.missing(2):
        buffer.write(index, {"x": torch.randn(3, 5), "y": torch.randn(7).bfloat16()}, {"prompt": "ä fox"})
    file = file_of(tmp_path, 1)
    content = file.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= random.randrange(1, 256)
        file.write_bytes(changed)
        assert str(file) in damage_of(tmp_path), position
    file.write_bytes(content)
    assert [entry.index for entry in Buffer.open(tmp_path, POLICY).entries()] == [0, 1]


def test_the_checksum_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    """By another path: the digits are found in the text of the header."""
    filled(tmp_path, 1)
    content = file_of(tmp_path, 0).read_bytes()
    said = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["entry"])["sha256"]
    assert hashlib.sha256(content.replace(said.encode(), b"0" * 64)).hexdigest() == said


def test_files_that_are_no_entries(tmp_path: Path) -> None:
    path = tmp_path / "buffer"
    filled(path, 3)
    filled(tmp_path / "other", 2, POLICY | {"checkpoint": "another"})
    file, content, third = file_of(path, 1), file_of(path, 1).read_bytes(), file_of(path, 2).read_bytes()
    file_of(path, 2).unlink()
    for length in (0, 7, 8, 100, *(random.randrange(len(content)) for _ in range(10)), len(content) - 1):
        file.write_bytes(content[:length])
        assert f"{file} is broken" in damage_of(path)
    for strange in (content + b"\0", random.randbytes(1000), b"\xff" * 8 + content[8:]):
        file.write_bytes(strange)
        assert f"{file} is broken" in damage_of(path)
    for header in ({}, {"format": "pt"}, {"entry": "x"}, {"entry": "[1]"}, {"entry": "{}"}):
        save_file({"x": torch.randn(3)}, file, metadata=header)
        assert f"{file} is broken: it is not an entry" in damage_of(path)
    file.write_bytes(third)
    assert "it says entry 2" in damage_of(path)
    file.write_bytes(file_of(tmp_path / "other", 1).read_bytes())
    assert values_digest(POLICY | {"checkpoint": "another"}) in damage_of(path)


def flip(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def test_training_goes_on_without_broken_entries(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    flip(file_of(tmp_path, 1))
    flip(file_of(tmp_path, 2), 0)
    with pytest.warns(UserWarning, match=r"000002.safetensors is broken") as caught:
        buffer = Buffer.open(tmp_path, POLICY)
    assert len(caught) == 1 and buffer.indices == [0, 1, 3]  # what only a reading of the file can see, an opening does not
    with pytest.warns(UserWarning, match=r"000001.safetensors is broken: its SHA-256") as caught:
        assert [next(buffer.entries([1, 2, 3])).index for _ in range(3)] == [3, 3, 3]
    assert len(caught) == 1 and buffer.indices == [0, 3]
    file_of(tmp_path, 0).unlink()  # as by a collection that found it broken
    with pytest.warns(UserWarning, match=r"000000.safetensors is missing"):
        assert [entry.index for entry in buffer.entries([0, 1, 3])] == [3]
    with pytest.raises(UserError, match="none of 2 entries"):
        next(buffer.entries([2, 1]))


def test_nothing_to_train_on(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(UserError, match=r"no replay buffer: it has no buffer.json.*arcopo_fast.collect"):
            Buffer.open(path, POLICY)
    Buffer.create(tmp_path / "empty", POLICY, RECIPE)
    with pytest.raises(UserError, match="is empty"):
        Buffer.open(tmp_path / "empty", POLICY)
    filled(tmp_path / "short", 2)
    for index in range(2):
        os.truncate(file_of(tmp_path / "short", index), 50)
    with pytest.warns(UserWarning, match="is broken"), pytest.raises(UserError, match="none of 2 entries"):
        Buffer.open(tmp_path / "short", POLICY)
    filled(tmp_path / "flipped", 2)
    for index in range(2):
        flip(file_of(tmp_path / "flipped", index))
    with pytest.warns(UserWarning, match="is broken"), pytest.raises(UserError, match="none of 2 entries"):
        list(Buffer.open(tmp_path / "flipped", POLICY).entries())


def test_a_collection_makes_broken_entries_again(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    flip(file_of(tmp_path, 2))
    os.truncate(file_of(tmp_path, 0), 99)
    bad = {index: file_of(tmp_path, index).read_bytes() for index in (0, 2)}
    reading = Buffer(tmp_path, json.loads((tmp_path / "buffer.json").read_text()))
    with pytest.warns(UserWarning):
        list(reading.entries())
    buffer, again = Buffer.create(tmp_path, POLICY, RECIPE), {}
    with pytest.warns(UserWarning, match=r"00000[02].safetensors is broken.*now 00000[02].broken") as caught:
        for index in buffer.missing(5):
            again[index] = group()
            buffer.write(index, *again[index])
    assert len(caught) == 2 and list(again) == [0, 2, 4]
    assert {index: file_of(tmp_path, index).with_suffix(".broken").read_bytes() for index in bad} == bad
    assert Buffer.open(tmp_path, POLICY).indices == [0, 1, 2, 3, 4]
    for index, (tensors, _) in again.items():
        assert all(same(buffer.read(index).tensors[name], tensor) for name, tensor in tensors.items())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    buffer = Buffer.create(tmp_path, POLICY, RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            for index in buffer.missing(1):
                buffer.write(index, *group())
        with pytest.raises(OSError, match="No space left"):
            Buffer.create(tmp_path / "new", POLICY, RECIPE)
    assert names(tmp_path) == [] and not list((tmp_path / "new").glob("*buffer*"))
    assert next(Buffer.create(tmp_path, POLICY, RECIPE).missing(1)) == 0  # nor a claim


# Policy and recipe -----------------------------------------------------------------------------------------------------------------


def test_a_buffer_of_another_policy_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    here = {"checkpoint": POLICY["checkpoint"], "sampler": {"steps": (1000, 350), "shift": 5.0, "kind": "ode"}}
    for attempt in (lambda: Buffer.open(tmp_path, here), lambda: Buffer.create(tmp_path, here, RECIPE)):
        with pytest.raises(UserError) as error:
            attempt()
        assert "\n" not in str(error.value)
        for part in (
            f"another policy ({values_digest(here)} here, {values_digest(POLICY)} in the buffer)",
            "sampler.steps: [1000, 350] here, [1000, 500] in the buffer",
            'sampler.kind: "ode" here, nothing in the buffer',
            "lora: nothing here, 4 in the buffer",
        ):
            assert part in str(error.value)
        assert "shift" not in str(error.value) and "checkpoint" not in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    with pytest.raises(UserError, match=r"key00: .*; and 12 more; use"):
        Buffer.open(tmp_path, POLICY | {f"key{number:02d}": number for number in range(20)})


def test_a_buffer_of_another_recipe_is_not_added_to_but_trained_on(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    with pytest.raises(UserError, match=r"another recipe.*rollout.group_size: 8 here, 12 in the buffer"):
        Buffer.create(tmp_path, POLICY, RECIPE | {"rollout": {"group_size": 8, "noise_strength": 0.5}})
    assert Buffer.open(tmp_path, POLICY).recipe == RECIPE


def test_the_number_wanted_grows(tmp_path: Path) -> None:
    wanted = [Buffer.create(tmp_path, POLICY, RECIPE, groups=groups).groups for groups in (None, 10, 30, 20, None)]
    assert wanted == [None, 10, 30, 30, 30]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("precious")
    with pytest.raises(UserError, match=r"no replay buffer: it holds diary.txt"):
        Buffer.create(tmp_path, POLICY, RECIPE)
    with pytest.raises(UserError, match="a file is in the way"):
        Buffer.create(tmp_path / "diary.txt", POLICY, RECIPE)
    with pytest.raises(UserError, match="a file is in the way"):
        Buffer.create(tmp_path / "diary.txt" / "buffer", POLICY, RECIPE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["diary.txt"]


def test_a_damaged_description(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    file = tmp_path / "buffer.json"
    text = file.read_text()
    edited = [text.replace(*change) for change in (("500", "501"), ('"groups"', '"g"'), ("fingerprint", "print"))]
    for damaged in (text[: random.randrange(1, len(text) - 1)], "", "[]", "{}", *edited):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"buffer.json is damaged"):
            Buffer.open(tmp_path, POLICY)
    file.write_text('{"format": 3}')
    with pytest.raises(UserError, match="has format 3, and this version reads 1 and 2"):
        Buffer.create(tmp_path, POLICY, RECIPE)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="has no locks .*put the buffer on another"):
        Buffer.create(tmp_path, POLICY, RECIPE)
