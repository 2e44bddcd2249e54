"""Every container of the published checkpoints gives the same tensors; names map both ways; bad files end in one line; writes are whole."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from support.errors import one_line
from support.models import TINY, tiny_wan
from support.official import official_name, to_diffusers_names, to_official_names
from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.model import checkpoints
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.sizes import CausalWanConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "public_sf_global.safetensors"  # written by the official code
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return dict(tiny_wan().state_dict())


@pytest.fixture
def official(state: State) -> State:
    return to_official_names(state)


def assert_same(ours: State, expected: State) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


# Names


def test_names_of_the_full_model_map_as_diffusers_maps_them() -> None:
    with torch.device("meta"):
        names = list(WanTransformer3DModel(num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960).state_dict())
    assert len(names) == 825
    official = [official_name(name) for name in names]
    assert [checkpoints.diffusers_name(name) for name in official] == names
    assert [checkpoints.diffusers_name(name) for name in names] == names  # diffusers names stay
    converted = convert_wan_transformer_to_diffusers({name: torch.empty(0) for name in official})
    assert set(converted) == set(names)
    indexed = convert_wan_transformer_to_diffusers({name: torch.tensor([index]) for index, name in enumerate(official)})
    assert [indexed[name].item() for name in names] == list(range(825))


def test_names_are_those_of_the_official_code() -> None:
    official = {name.removeprefix("w/model.") for name in load_file(FIXTURE) if name.startswith("w/")}
    names = CausalWan(TINY).state_dict().keys()
    assert official == {official_name(name) for name in names}


def test_both_maps_keep_tensors(state: State, official: State) -> None:
    assert_same(to_diffusers_names(official), state)
    assert_same(to_official_names(to_diffusers_names(official)), official)


# Containers


def prefixed(state: State, pattern: str) -> State:
    return {pattern.format(name): tensor for name, tensor in state.items()}


def in_blocks(state: State, wrapper: str) -> State:
    """The names of a model whose blocks are wrapped one by one."""
    renamed = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        index, _, rest = rest.partition(".") if head == "blocks" else ("", "", rest)
        renamed[f"blocks.{index}.{wrapper}.{rest}" if head == "blocks" else name] = tensor
    return renamed


def fsdp(state: State) -> State:
    return prefixed(in_blocks(state, "_fsdp_wrapped_module"), "model._fsdp_wrapped_module.{}")


def write_shards(directory: Path, state: State) -> Path:
    directory.mkdir()
    names = sorted(state)
    shards = {f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_directory(directory: Path, state: State) -> Path:
    directory.mkdir(parents=True)
    save_file(state, directory / "diffusion_pytorch_model.safetensors")
    (directory / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2, "dim": 24}))
    return directory


def torch_file(path: Path, content: object, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


def safetensors_file(path: Path, state: State) -> Path:
    save_file(state, path)
    return path


CONTAINERS: dict[str, Callable[[Path, State], Path]] = {
    "flat": lambda p, s: torch_file(p / "m.pt", s),
    "wrapper-prefix": lambda p, s: torch_file(p / "m.pth", prefixed(s, "model.{}")),
    "legacy-pickle": lambda p, s: torch_file(p / "m.bin", prefixed(s, "model.{}"), _use_new_zipfile_serialization=False),
    "generator": lambda p, s: torch_file(p / "m.pt", {"generator": prefixed(s, "model.{}"), "critic": {"x": torch.ones(1)}}),
    "model": lambda p, s: torch_file(p / "m.ckpt", {"model": prefixed(s, "model.{}"), "step": 7}),
    "ema-fsdp": lambda p, s: torch_file(p / "m.pt", {"generator_ema": fsdp(s), "critic": {"x": torch.ones(1)}}),
    "checkpointed-compiled": lambda p, s: torch_file(p / "m.pt", prefixed(in_blocks(s, "_checkpoint_wrapped_module"), "_orig_mod.{}")),
    "ddp": lambda p, s: torch_file(p / "m.pt", {"generator": prefixed(s, "module.model.{}")}),
    "safetensors": lambda p, s: safetensors_file(p / "m.safetensors", prefixed(s, "model.{}")),
    "comfy": lambda p, s: safetensors_file(p / "m.safetensors", prefixed(s, "model.diffusion_model.{}")),
    "directory": lambda p, s: write_directory(p / "m", s),
    "pipeline": lambda p, s: write_directory(p / "m" / "transformer", s).parent,
    "shards": lambda p, s: write_shards(p / "m", s),
}


@pytest.mark.parametrize("names", ["official", "diffusers"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_container(container: str, names: str, tmp_path: Path, state: State, official: State) -> None:
    path = CONTAINERS[container](tmp_path, official if names == "official" else state)
    assert_same(checkpoints.read_state_dict(path), state)
    assert_same(checkpoints.read_state_dict(str(path)), state)


def test_choice_of_weights(tmp_path: Path, official: State, caplog: pytest.LogCaptureFixture) -> None:
    doubled = {name: 2 * tensor for name, tensor in official.items()}
    path = torch_file(tmp_path / "m.pt", {"generator": prefixed(official, "model.{}"), "generator_ema": prefixed(doubled, "model.{}")})
    with caplog.at_level("INFO"):
        assert_same(checkpoints.read_state_dict(path), to_diffusers_names(doubled))
    assert f"{path}: taking generator_ema (the file holds generator_ema, generator)" in caplog.text
    assert_same(checkpoints.read_state_dict(path, weights="ema"), to_diffusers_names(doubled))
    assert_same(checkpoints.read_state_dict(path, weights="generator"), to_diffusers_names(official))

    only = torch_file(tmp_path / "only.pt", {"generator": official})
    with pytest.raises(UserError) as error:
        checkpoints.read_state_dict(only, weights="ema")
    one_line(error, only, "holds generator", "generator_ema")
    with pytest.raises(UserError) as error:
        checkpoints.read_state_dict(torch_file(tmp_path / "flat.pt", official), weights="ema")
    one_line(error, "flat.pt", "single set")


# Bad files


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(Path.cwd() / "executed"),)


def bytes_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def damaged_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/readme.txt", "no checkpoint")
    return path


def torchscript(path: Path) -> Path:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)), path)
    return path


def incomplete_shards(path: Path, state: State) -> Path:
    (write_shards(path, state) / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    return path


def shards_without_index(path: Path, state: State) -> Path:
    (write_shards(path, state) / "diffusion_pytorch_model.safetensors.index.json").unlink()
    return path


def escaping_index(path: Path) -> Path:
    path.mkdir()
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    return path


def empty_directory(path: Path) -> Path:
    path.mkdir()
    return path


def random_bytes() -> bytes:
    return bytes(torch.randint(0, 256, (500,)).tolist())


BAD_FILES: dict[str, tuple[Callable[[Path, State], Path], str]] = {
    "missing": (lambda p, s: p / "none.pt", "does not exist"),
    "empty-pt": (lambda p, s: bytes_file(p / "m.pt", b""), "is empty"),
    "empty-safetensors": (lambda p, s: bytes_file(p / "m.safetensors", b""), "is empty"),
    "garbage-pt": (lambda p, s: bytes_file(p / "m.pt", random_bytes()), "damaged"),
    "garbage-safetensors": (lambda p, s: bytes_file(p / "m.safetensors", random_bytes()), "damaged"),
    "safetensors-named-pt": (lambda p, s: bytes_file(p / "m.pt", safetensors_file(p / "m.safetensors", s).read_bytes()), "damaged"),
    "zip": (lambda p, s: damaged_zip(p / "m.pt"), "damaged"),
    "torchscript": (lambda p, s: torchscript(p / "m.pt"), "TorchScript"),
    "lfs-pointer": (lambda p, s: bytes_file(p / "m.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "suffix": (lambda p, s: bytes_file(p / "m.gguf", b"GGUF"), ".safetensors"),
    "object": (lambda p, s: torch_file(p / "m.pt", {"generator": s, "args": argparse.Namespace(lr=1)}), "argparse.Namespace"),
    "code": (lambda p, s: torch_file(p / "m.pt", {"generator": s, "x": RunsCode()}), "refused"),
    "code-pickle": (lambda p, s: bytes_file(p / "m.pt", pickle.dumps({"x": RunsCode()}, protocol=2)), "refused"),
    "list": (lambda p, s: torch_file(p / "m.pt", [torch.randn(2)]), "holds a list"),
    "not-tensors": (lambda p, s: torch_file(p / "m.pt", {"lr": 0.1}), "not a tensor"),
    "no-tensors": (lambda p, s: torch_file(p / "m.pt", {}), "no tensors"),
    "resnet": (lambda p, s: torch_file(p / "m.pt", {f"layer1.{i}.conv1.weight": torch.randn(2) for i in (0, 1)}), "layer1.0.conv1.weight"),
    "image-to-video": (lambda p, s: torch_file(p / "m.pt", s | {"img_emb.proj.0.weight": torch.randn(2)}), "image-to-video"),
    "image-to-video-diffusers": (
        lambda p, s: torch_file(p / "m.pt", s | {"blocks.0.attn2.add_k_proj.weight": torch.randn(2)}),
        "image-to-video",
    ),
    "twice": (lambda p, s: torch_file(p / "m.pt", s | prefixed(s, "model.{}")), "both named"),
    "no-weights": (lambda p, s: empty_directory(p / "m"), "diffusion_pytorch_model"),
    "lost-shard": (lambda p, s: incomplete_shards(p / "m", s), "00002-of-00002"),
    "no-index": (lambda p, s: shards_without_index(p / "m", s), "index"),
    "escaping-index": (lambda p, s: escaping_index(p / "m"), "outside"),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit's deprecation, torch.load's remark on pickle protocols
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(kind: str, tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write, part = BAD_FILES[kind]
    path = write(tmp_path, state)
    with pytest.raises(UserError) as error:
        checkpoints.read_state_dict(path)
    one_line(error, path, part)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "legacy.pt"])
def test_truncated_anywhere(name: str, tmp_path: Path, state: State) -> None:
    path = tmp_path / name
    if name == "m.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "m.pt")
    whole = path.read_bytes()
    for part in (1, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(UserError) as error:
            checkpoints.read_state_dict(path)
        one_line(error, path)


# Sizes


@pytest.mark.parametrize("sizes", [TINY, CausalWanConfig(1, 1, 128, 16, 8, 6, 512, 3, 5, (1, 1, 2))], ids=["heads-given", "heads-of-128"])
def test_sizes_are_read_off(sizes: CausalWanConfig) -> None:
    with torch.device("meta"):
        state = CausalWan(sizes).state_dict()
    heads = {"num_attention_heads": 2, "attention_head_dim": 12} if sizes is TINY else None
    inferred = checkpoints.infer_config(state, heads)
    expected = sizes.to_dict()
    assert inferred == {name: value for name, value in expected.items() if name not in ("text_len", "eps")}
    given = checkpoints.infer_config(state, expected)
    assert CausalWanConfig(**given) == sizes


def test_official_config(tmp_path: Path, state: State) -> None:
    directory = write_directory(tmp_path / "m", state)
    assert checkpoints.read_config(tmp_path / "none.pt") is None
    config = checkpoints.read_config(directory)
    assert checkpoints.infer_config(state, config)["num_attention_heads"] == 2
    content = {"_class_name": "WanModel", "model_type": "t2v", "text_len": 5, "in_dim": 4, "dim": 24, "num_heads": 3, "eps": 1e-5}
    (directory / "config.json").write_text(json.dumps(content))
    sizes = checkpoints.infer_config(state, checkpoints.read_config(directory / "diffusion_pytorch_model.safetensors"))
    assert (sizes["num_attention_heads"], sizes["attention_head_dim"], sizes["text_len"], sizes["eps"]) == (3, 8, 5, 1e-5)


def test_config_that_contradicts(tmp_path: Path, state: State) -> None:
    def refused(config: dict[str, object] | None, *parts: object, **changes: Tensor) -> None:
        with pytest.raises(UserError) as error:
            checkpoints.infer_config(state | changes, config, source="m.pt")
        one_line(error, "m.pt", *parts)

    refused(None, "24", "num_attention_heads")
    refused({"num_attention_heads": 2, "num_layers": 3}, "num_layers 3", "2")
    refused({"num_attention_heads": 5}, "5 heads")
    refused({"num_attention_heads": 2, "attention_head_dim": 8}, "2 heads of 8", "24")
    refused({"num_attention_heads": 2, "patch_size": [1, 4, 4]}, "patch_size")
    refused(None, "proj_out.weight", **{"proj_out.weight": torch.randn(2)})
    refused(None, "no block 2", **{"blocks.3.attn1.to_q.weight": torch.randn(2)})
    del state["condition_embedder.time_embedder.linear_1.weight"]
    refused(None, "condition_embedder.time_embedder.linear_1.weight is missing")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"_class_name": "WanTransformer3DModel", "image_dim": 1280}, "image-to-video"),
        ({"num_heads": 2, "dim": 24, "model_type": "i2v"}, "image-to-video"),
        ({"qk_norm": "layer_norm"}, "RMSNorm"),
        ([1, 2], "list"),
        ("{", "JSON"),
    ],
)
def test_bad_config(config: object, part: str, tmp_path: Path, state: State) -> None:
    directory = write_directory(tmp_path / "m", state)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError) as error:
        checkpoints.read_config(directory)
    one_line(error, directory / "config.json", part)


# Into a module


def test_load_into(state: State) -> None:
    model = tiny_wan().to(torch.bfloat16)
    checkpoints.load_into(model, state)
    assert_same(dict(model.state_dict()), {name: tensor.bfloat16() for name, tensor in state.items()})
    with torch.device("meta"):
        model = CausalWan(TINY)
    checkpoints.load_into(model, state)
    assert_same(dict(model.state_dict()), state)


def test_load_into_is_strict(state: State) -> None:
    model = tiny_wan()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1.")}
    changed["proj_out.weight"] = torch.randn(3, 24)
    changed["blocks.7.attn1.to_q.weight"] = torch.randn(2)
    with pytest.raises(UserError) as error:
        checkpoints.load_into(model, changed, source="some/file.pt")
    absent = [name for name in state if name.startswith("blocks.1.")]
    assert len(absent) == 27
    one_line(error, "some/file.pt", "27 missing (" + ", ".join(sorted(absent)[:10]) + " and 17 more)")
    one_line(error, "1 unexpected (blocks.7.attn1.to_q.weight)", "proj_out.weight [3, 24] instead of [16, 24]")
    assert_same(dict(model.state_dict()), before)


# Writing


def test_saved_transformer_is_diffusers_own(tmp_path: Path) -> None:
    model = tiny_wan()
    checkpoints.save_transformer(tmp_path / "deep" / "m", model.state_dict(), model.config.to_dict())
    assert sorted(file.name for file in (tmp_path / "deep" / "m").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert os.listdir(tmp_path / "deep") == ["m"]
    plain = bytes_file(tmp_path / "plain", b"")
    for file in (tmp_path / "deep" / "m").iterdir():
        assert file.stat().st_mode == plain.stat().st_mode, file

    state, config = checkpoints.read_state_dict(tmp_path / "deep" / "m"), checkpoints.read_config(tmp_path / "deep" / "m")
    assert_same(state, dict(model.state_dict()))
    assert CausalWanConfig(**checkpoints.infer_config(state, config)) == TINY

    reference = WanTransformer3DModel.from_pretrained(tmp_path / "deep" / "m")
    latents, text, timestep = torch.randn(2, 3, 4, 8, 6), torch.randn(2, 5, 10), torch.tensor([[437.5], [900.0]])
    with torch.no_grad():
        ours = model(latents, timestep, model.encode_text(text))
        theirs = reference(latents.transpose(1, 2), timestep[:, 0], text).sample.transpose(1, 2)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_save_replaces_a_former_save_only(tmp_path: Path, state: State) -> None:
    target = tmp_path / "m"
    checkpoints.save_transformer(target, state, TINY.to_dict())
    newer = {name: tensor + 1 for name, tensor in state.items()}
    checkpoints.save_transformer(target, newer, TINY.to_dict())
    assert_same(checkpoints.read_state_dict(target), newer)

    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        checkpoints.save_transformer(target, state, TINY.to_dict())
    one_line(error, target, "notes.txt")
    assert_same(checkpoints.read_state_dict(target), newer)
    with pytest.raises(UserError) as error:
        checkpoints.save_transformer(target / "notes.txt", state, TINY.to_dict())
    one_line(error, "notes.txt", "is a file")
    with pytest.raises(UserError) as error:
        checkpoints.save_transformer(target / "notes.txt" / "below", state, TINY.to_dict())
    one_line(error, "below", "cannot be written")
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_save_leaves_the_former_one(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m"
    checkpoints.save_transformer(target, state, TINY.to_dict())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # like a disk that becomes full within the weights
        with pytest.raises(UserError) as error:
            checkpoints.save_transformer(target, {name: tensor + 1 for name, tensor in state.items()}, TINY.to_dict())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error, target, "cannot be written")
    with pytest.raises(KeyboardInterrupt), checkpoints.atomic_directory(target) as temporary:
        (temporary / "config.json").write_text("{}")
        raise KeyboardInterrupt
    calls = iter((os.rename, unable, os.rename))  # the former one aside, the new one in its place, the former one back
    monkeypatch.setattr(os, "rename", lambda source, destination: next(calls)(source, destination))
    with pytest.raises(UserError, match="No space left"):
        checkpoints.save_transformer(target, {name: tensor + 1 for name, tensor in state.items()}, TINY.to_dict())
    assert os.listdir(tmp_path) == ["m"]
    assert_same(checkpoints.read_state_dict(target), state)


def unable(source: Path, destination: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_adapters_are_not_saved_as_a_transformer(tmp_path: Path, state: State) -> None:
    with pytest.raises(ValueError, match="adapter"):
        checkpoints.save_transformer(tmp_path / "m", {"blocks.0.attn1.to_q.base_layer.weight": torch.randn(2)}, TINY.to_dict())
    assert os.listdir(tmp_path) == []
