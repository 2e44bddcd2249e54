"""What a run was begun with: samples that see any trained tensor, and a run held to it."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.storage.identity import (
    INPUTS,
    check_inputs,
    check_settings,
    describe,
    digest,
    file_digest,
    require_same,
    sampled_digest,
    values_digest,
    weights_digest,
)

MADE_OF = {"transformer": "0123", "VAE": "4567"}
CONFIG = load_config("toy")
JUDGES = {"one": "89", "other": "ab"}


def tensors() -> dict[str, Tensor]:
    return {
        "matrix": torch.randn(300, 70),
        "half": torch.randn(129, dtype=torch.bfloat16),
        "number": torch.randn(()),
        "whole": torch.randint(100, (7,)),
        "eight": torch.randn(200).to(torch.float8_e4m3fn),
        "empty": torch.randn(0, 3),
    }


def test_samples_see_every_tensor_that_was_trained() -> None:
    given = tensors()
    digest = sampled_digest(given.items())
    assert sampled_digest({name: tensor.clone() for name, tensor in given.items()}.items()) == digest
    assert sampled_digest((given | {"matrix": given["matrix"].t().contiguous().t()}).items()) == digest, "strides do not matter"
    others = [given | {name: (2 * tensor.float() + 1).to(tensor.dtype)} for name, tensor in given.items() if tensor.numel()]
    for changed in ({"matrix": given["matrix"].double()}, {"matrix": given["matrix"].view(70, 300)}, {"more": torch.ones(1)}):
        others.append(given | changed)
    others += [{f"{name}'": tensor for name, tensor in given.items()}, {name: given[name] for name in list(given)[1:]}]
    seen = {sampled_digest(other.items()) for other in others} | {sampled_digest(given.items(), b"code"), digest}
    assert len(seen) == len(others) + 2


def test_few_elements_are_read() -> None:
    """Of an expanded tensor that could not be held."""
    large = torch.randn(1).expand(1 << 28)
    assert sampled_digest([("large", large)]) == sampled_digest([("large", large)])


def test_a_digest_of_values_is_of_their_sorted_json() -> None:
    assert values_digest({"b": (1, 2), "a": {"y": 1.5, "x": None}}) == values_digest({"a": {"x": None, "y": 1.5}, "b": [1, 2]})
    assert values_digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:16]
    assert len({values_digest(values) for values in ({}, {"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": {}})}) == 7


def test_a_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content, read = random.randbytes(3 << 20), []
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file", read.append) == digest(content) == hashlib.sha256(content).hexdigest()
    assert sum(read) == len(content) and digest("é") == digest("é".encode())


def test_a_description_is_flat_and_as_json_gives_it_back() -> None:
    found = describe({"seed": 3, "sampler": {"steps": (1000, 500), "shift": None}, "rewards": {}})
    assert found == {"seed": 3, "sampler.steps": [1000, 500], "sampler.shift": None} == json.loads(json.dumps(found))


def test_what_differs_is_named() -> None:
    there = {"seed": 3, "sampler": {"steps": [1000, 500], "shift": None}, "old": None}
    for same in (there, describe(there), {"seed": 3.0, "sampler": {"steps": (1000, 500)}, "new": None}):
        require_same("it differs", there, same, "do something")
    with pytest.raises(UserError) as error:
        require_same(
            "it differs", there, {"sampler.steps": [1000], "sampler.shift": 5, "long": "x" * 200}, "do something", places=("here", "in it")
        )
    assert str(error.value) == (
        f'it differs: long: "{"x" * 76}... here, nothing in it; sampler.shift: 5 here, null in it; sampler.steps: [1000] here, '
        "[1000, 500] in it; seed: nothing here, 3 in it; do something"
    )
    with pytest.raises(UserError, match=r"key07: .*; and 12 more; do"):
        require_same("it differs", {}, {f"key{number:02d}": number for number in range(20)}, "do something")


def test_a_run_is_held_to_what_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_inputs(tmp_path, CONFIG, MADE_OF, JUDGES, done=0)
    check_inputs(tmp_path, CONFIG, MADE_OF, JUDGES, done=3)
    assert capsys.readouterr().err == ""
    before = (tmp_path / INPUTS).read_bytes()
    for change, said in (
        ({"VAE": "0"}, 'VAE: "0" here, "4567" there'),
        ({"VAE": "0", "transformer": "0"}, 'VAE: "0" here, "4567" there; transformer: "0" here, "0123" there'),
        ({"prompts": "0"}, 'prompts: "0" here, null there'),
    ):
        problem = rf"^{tmp_path} was begun with other inputs than those here now, .*: {said}; put back .* start a new run$"
        with pytest.raises(UserError, match=problem):
            check_inputs(tmp_path, CONFIG, MADE_OF | change, JUDGES | {"one": "0"}, done=3)
    assert (tmp_path / INPUTS).read_bytes() == before and capsys.readouterr().err == ""
    check_inputs(tmp_path, CONFIG, MADE_OF, JUDGES | {"other": "cd"}, done=3)
    assert capsys.readouterr().err.startswith(f"other: code or weights changed since {tmp_path} last ran")
    check_inputs(tmp_path, CONFIG, MADE_OF, JUDGES | {"other": "cd"}, done=4)
    assert capsys.readouterr().err == "", "said once"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"made_of": 3, "judges": {}})])
def test_what_is_damaged_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / INPUTS).write_text(content)
    with pytest.raises(UserError, match=f"{INPUTS} is damaged.*remove it"):
        check_inputs(tmp_path, CONFIG, MADE_OF, JUDGES, done=random.randrange(9))
    assert (tmp_path / INPUTS).read_text() == content


def test_a_digest_of_weights_is_of_every_byte_name_and_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.view(torch.uint8).numpy().tobytes())
    assert weights_digest(model.state_dict()) == found.hexdigest() == weights_digest(copy.deepcopy(model).state_dict())
    others = [copy.deepcopy(model).float(), nn.Sequential(model[0]), nn.ModuleDict({"0": model[0], "2": model[1]}), copy.deepcopy(model)]
    bits = others[-1][1].bias.data.view(torch.int16)
    bits[-1] ^= 1  # the last bit of the last element
    assert len({weights_digest(other.state_dict()) for other in [model, *others]}) == 5


def test_the_windows_of_a_run_that_goes_on_are_told_apart_key_by_key(tmp_path: Path) -> None:
    windows = "judge.windows={{near: {{chunks: [0, 0], before: {before}}}, far: {{chunks: [0, null], weight: 0.5}}}}"
    plain, begun, other = load_config("toy"), *(load_config("toy", [windows.format(before=before)]) for before in (2, 3))
    check_inputs(tmp_path, begun, {}, {}, done=0)
    check_settings(tmp_path, begun)
    with pytest.raises(UserError, match="was changed since the run began: judge.windows.near.before from 2 to 3; "):
        check_settings(tmp_path, other)
    with pytest.raises(UserError, match="judge.windows.far.chunks from .* to nothing"):
        check_settings(tmp_path, plain)
    (tmp_path / "inputs.json").unlink()
    check_inputs(tmp_path, plain, {}, {}, done=0)
    check_settings(tmp_path, plain)
    with pytest.raises(UserError, match="judge.windows from {} to nothing, judge.windows.far.before from nothing to 0"):
        check_settings(tmp_path, begun)
