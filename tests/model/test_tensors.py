"""Weights are finite and of a dtype that weights have, or they do not enter: of generator, VAE and text encoder, in every container."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from support.measure import LiveBytes
from support.models import small_model
from support.official import to_official_names
from support.umt5 import official_state
from torch import Tensor, nn

from arcopo_fast.build import load_model
from arcopo_fast.errors import UserError
from arcopo_fast.model.checkpoints import read_state_dict
from arcopo_fast.model.tensors import check_finite, rename
from arcopo_fast.model.text import TextEncoderFiles, load_umt5
from arcopo_fast.model.vae import load_vae

State = dict[str, Tensor]
SIZES = {"attention_head_dim": 128, "num_attention_heads": 1, "num_layers": 1}


def generator() -> State:
    return {name: tensor.detach().clone() for name, tensor in small_model(**SIZES).state_dict().items()}


def vae() -> State:
    return {name: tensor.detach().clone() for name, tensor in AutoencoderKLWan(base_dim=4).state_dict().items()}


def text_encoder(file: Path) -> nn.Module:
    return load_umt5(TextEncoderFiles(file, file), dtype=torch.float32)


KINDS: dict[str, tuple[Callable[[], State], Callable[[Path], nn.Module]]] = {
    "generator": (generator, load_model),
    "VAE": (vae, load_vae),
    "text encoder": (official_state, text_encoder),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def refused(load: Callable[[Path], object], path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        load(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for part in (str(path), *parts):
        assert part in text, f"{part!r} is not in: {text}"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite(kind: str, value: float, suffix: str, tmp_path: Path) -> None:
    make, load = KINDS[kind]
    state = make()
    good = written(tmp_path / f"good{suffix}", state)
    assert all(parameter.isfinite().all() for parameter in load(good).parameters())
    for name in (next(iter(state)), list(state)[-1]):
        bad = {key: tensor.clone() for key, tensor in state.items()}
        bad[name].view(-1)[-1] = value
        refused(load, written(tmp_path / f"bad{suffix}", bad), "not finite", name.rpartition(".")[2])


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str
)
def test_dtypes_that_are_no_weights(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, load = KINDS[kind]
    state = make()
    name = list(state)[2]
    state[name] = torch.ones_like(state[name]).to(dtype)
    refused(load, written(tmp_path / "bad.pt", state), name, str(dtype).removeprefix("torch."), "not a dtype of weights")


def test_sparse_tensors_are_no_weights(tmp_path: Path) -> None:
    state = generator()
    state["proj_out.weight"] = state["proj_out.weight"].to_sparse()
    refused(load_model, written(tmp_path / "bad.pt", state), "proj_out.weight", "sparse")


def test_what_a_dtype_cannot_hold_is_told_by_its_name(tmp_path: Path) -> None:
    state = generator()
    state["proj_out.weight"][0, 0] = 1e5
    path = written(tmp_path / "large.pt", state)
    assert load_model(path, dtype=torch.bfloat16).proj_out.weight.isfinite().all()
    refused(lambda file: load_model(file, dtype=torch.float16), path, "proj_out.weight", "float16 is too narrow")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (3, 4, 5)], ids=str)
def test_finite_values_of_any_shape_pass(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    extremes = torch.full(shape, largest, dtype=dtype)
    check_finite({"a": extremes, "b": -extremes, "c": torch.zeros(shape, dtype=dtype), "d": torch.empty(shape, device="meta")}, "x")
    for value in (math.nan, math.inf, -math.inf):
        odd = {"good": extremes, "bad": torch.full((*shape, 3), value, dtype=dtype).movedim(-1, 0)}
        if odd["bad"].numel():
            with pytest.raises(UserError, match="^x: bad holds values"):
                check_finite(odd, "x")


def test_the_check_makes_nothing_of_the_tensors_size() -> None:
    state = {"a": torch.randn(300, 400), "b": torch.randn(400, 300).T, "c": torch.randn(100_000).bfloat16()}
    live = LiveBytes(state.values())
    with live:
        check_finite(state, "x")
    assert live.peak <= 64


def test_two_names_that_become_one(tmp_path: Path) -> None:
    state = generator()
    official = to_official_names({"blocks.0.attn1.to_q.weight": state["blocks.0.attn1.to_q.weight"]})
    refused(read_state_dict, written(tmp_path / "both.pt", state | official), "two entries", "blocks.0.attn1.to_q.weight")
    with pytest.raises(UserError, match="^x: two entries are both 'n'"):
        rename({"a": 1, "b": 2}, lambda name: "n", "x")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    state, directory = generator(), tmp_path / "model"
    directory.mkdir()
    names = list(state)
    files = {"one.safetensors": names[:5], "two.safetensors": names[4:]}
    for file, part in files.items():
        written(directory / file, {name: state[name] for name in part})
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(read_state_dict, directory, "several shards", names[4])


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
@pytest.mark.parametrize(
    "value", [None, 3, [], [0.5] * 15, [True] * 16, ["a"] * 16, [[1.0]] * 16, {"a": 1}, [0.0] * 16, [-1.0] * 16], ids=repr
)
def test_statistics_of_latents_that_are_none(name: str, value: object, tmp_path: Path) -> None:
    if name == "latents_mean" and value in ([0.0] * 16, [-1.0] * 16):
        return
    model = AutoencoderKLWan(base_dim=4)
    model.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {name: value}))
    refused(load_vae, tmp_path / "vae", name, "16 ")
