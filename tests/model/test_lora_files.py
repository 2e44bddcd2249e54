"""Adapters in files: peft and diffusers read them to the same outputs, bad ones end in one line, and two are merged exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft import PeftModel
from peft.utils import load_peft_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.lora import ALPHA, RANK, Inputs, adapted, as_diffusers, assert_close, copy_of
from support.models import tiny_wan
from support.official import official_name
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.model import lora
from arcopo_fast.model.causal_wan import CausalWan

# In files


@pytest.mark.parametrize("targets", [lora.BLOCK_TARGETS, ("attn1.to_q", "attn1.to_v", "condition_embedder.time_proj")], ids=["all", "some"])
@pytest.mark.parametrize(("rank", "alpha"), [(3, 7.0), (4, 2.5), (4, 4.0)])
def test_saved_adapter_loads_everywhere(tmp_path: Path, rank: int, alpha: float, targets: tuple[str, ...]) -> None:
    model, inputs = tiny_wan(), Inputs()
    base_output = inputs.through(model)
    output = inputs.through(adapted(model, rank, alpha, targets))
    assert (output - base_output).abs().max() > 0.1
    directory = tmp_path / "run" / "adapter"
    lora.save_adapter(directory, model, base_model="some/base")
    assert sorted(os.listdir(directory)) == ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert os.listdir(directory.parent) == ["adapter"]

    # ours
    ours = lora.load_adapter(copy_of(model), directory)
    assert torch.equal(inputs.through(ours), output)
    assert torch.equal(inputs.through(lora.load_adapter(adapted(copy_of(model), rank, alpha, targets), directory)), output)

    # peft, whose layers round in other places: on our network, and on diffusers'
    assert_close(inputs.through(PeftModel.from_pretrained(copy_of(model), str(directory))), output)
    assert len(load_peft_weights(str(directory), device="cpu")) == len(lora.adapter_state(model))
    assert_close(inputs.through(PeftModel.from_pretrained(as_diffusers(model), str(directory)).get_base_model()), output)

    # diffusers: the file, the tensors, and the directory as pipelines read it
    theirs = as_diffusers(model)
    assert_close(inputs.through(theirs), base_output)
    theirs.load_lora_adapter(str(directory), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    assert_close(inputs.through(theirs), output)

    pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), as_diffusers(model))
    pipeline.load_lora_weights(str(directory))
    assert_close(inputs.through(pipeline.transformer), output)
    theirs = as_diffusers(model)
    theirs.load_lora_adapter(load_file(directory / "pytorch_lora_weights.safetensors"), prefix="transformer")
    assert_close(inputs.through(theirs), output)

    # and ours from the diffusers form alone
    (directory / "adapter_model.safetensors").unlink()
    assert_close(inputs.through(lora.load_adapter(copy_of(model), directory)), output)
    assert_close(inputs.through(lora.load_adapter(copy_of(model), directory / "pytorch_lora_weights.safetensors")), output)


def test_saved_files(tmp_path: Path) -> None:
    model = adapted(tiny_wan())
    lora.save_adapter(tmp_path / "a", model, base_model="some/base")
    lora.save_adapter(tmp_path / "b", model, base_model="some/base")
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["base_model_name_or_path"]) == (3, 7, "LORA", "some/base")
    state = lora.adapter_state(model)
    peft_form = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(peft_form) == len(state)
    assert all(torch.equal(peft_form[f"base_model.model.{name}"], tensor) for name, tensor in state.items())
    diffusers_form = load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    assert diffusers_form.keys() == {f"transformer.{name}" for name in state}
    for name, tensor in state.items():
        torch.testing.assert_close(diffusers_form[f"transformer.{name}"], tensor * (ALPHA / RANK if ".lora_B." in name else 1))
    with pytest.raises(ValueError, match="no adapter"):
        lora.save_adapter(tmp_path / "c", tiny_wan())
    lora.save_adapter(tmp_path / "a", adapted(copy_of(model)))  # again, over the former one
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        lora.save_adapter(tmp_path / "a", model)


def test_state_round_trip_is_strict() -> None:
    model = adapted(tiny_wan())
    saved = {name: tensor.clone() for name, tensor in lora.adapter_state(model).items()}
    other = adapted(copy_of(model))
    identities = [id(p) for p in lora.adapter_parameters(other)]
    lora.load_adapter_state(other, saved)
    assert identities == [id(p) for p in lora.adapter_parameters(other)]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in lora.adapter_state(other).items())
    first, second, *_ = saved
    changed = {name: tensor + 1 for name, tensor in saved.items() if name != first} | {second: torch.randn(1, 1), "x": torch.randn(1)}
    with pytest.raises(UserError) as error:
        lora.load_adapter_state(other, changed, source="some/file")
    reshaped = f"1 of another shape ({second} [1, 1] instead of {list(saved[second].shape)})"
    for part in ("some/file", f"1 missing ({first})", "1 unexpected (x)", reshaped):
        assert part in str(error.value)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in lora.adapter_state(other).items())


def test_header_that_diffusers_writes(tmp_path: Path) -> None:
    model, inputs = adapted(tiny_wan()), Inputs()
    header = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.target_modules": ["to_q"]})
    state = {f"transformer.{name}": tensor.clone() for name, tensor in lora.adapter_state(model).items()}
    save_file(state, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": header})
    assert torch.equal(inputs.through(lora.load_adapter(copy_of(model), tmp_path / "lora.safetensors")), inputs.through(model))


@pytest.mark.parametrize("nested", [True, False])
def test_longlive_adapter(tmp_path: Path, nested: bool) -> None:
    model, inputs = adapted(tiny_wan(), rank=4, alpha=4), Inputs()
    state = {f"base_model.model.{official_name(name)}": tensor for name, tensor in lora.adapter_state(model).items()}
    assert "base_model.model.blocks.1.self_attn.o.lora_A.weight" in state and "base_model.model.blocks.0.ffn.2.lora_B.weight" in state
    torch.save({"generator_lora": state, "step": 3} if nested else state, tmp_path / "lora.pt")
    loaded = lora.load_adapter(copy_of(model), tmp_path / "lora.pt")
    assert torch.equal(inputs.through(loaded), inputs.through(model))
    torch.save({"generator_lora": state, "alpha": 8} if nested else {**state, "alpha": 8}, tmp_path / "doubled.pt")
    doubled = lora.load_adapter(copy_of(model), tmp_path / "doubled.pt")
    for parameter in lora.adapter_parameters(model)[1::2]:
        parameter.data *= 2
    assert_close(inputs.through(doubled), inputs.through(model))


def test_bad_adapters_end_in_one_line(tmp_path: Path) -> None:
    model = adapted(tiny_wan())
    state = lora.adapter_state(model)

    def refused(path: Path, *parts: str, into: CausalWan | None = None) -> None:
        with pytest.raises(UserError) as error:
            lora.load_adapter(into or copy_of(model), path)
        assert "\n" not in str(error.value)
        for part in (str(path), *parts):
            assert part in str(error.value), f"{part!r} is not in: {error.value}"

    def file(name: str, content: dict[str, Tensor]) -> Path:
        save_file(content, tmp_path / name)
        return tmp_path / name

    lora.save_adapter(tmp_path / "good", model)
    first, second = list(state)[:2]
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "adapter_model.safetensors")
    refused(file("foreign.safetensors", {"unet.x.weight": torch.randn(2, 2)}), "unet.x.weight")
    refused(file("empty.safetensors", {}), "no adapter tensors")
    refused(file("half.safetensors", {first: state[first].clone()}), "only one of lora_A and lora_B")
    refused(file("ranks.safetensors", {first: torch.randn(2, 24), second: torch.randn(24, 3)}), "2, 3")
    refused(file("layer.safetensors", {f"blocks.9.to_q.lora_{x}.weight": torch.randn(2, 2) for x in "AB"}), "blocks.9.to_q")
    refused(file("size.safetensors", {first: torch.randn(2, 99), second: torch.randn(24, 2)}), "99 to 24", "24 to 24")
    refused(tmp_path / "good", "rank 3", "rank 2", into=adapted(copy_of(model), rank=2))
    refused(tmp_path / "good", "alpha 7", "alpha 6", into=adapted(copy_of(model), alpha=6))
    refused(tmp_path / "good", "unexpected", into=adapted(copy_of(model), targets=("to_q",)))
    config = tmp_path / "good" / "adapter_config.json"
    former = json.loads(config.read_text())
    for change, part in (({"r": 5}, "rank 5"), ({"use_dora": True}, "use_dora"), ({"alpha_pattern": {"to_q": 1}}, "alpha_pattern")):
        config.write_text(json.dumps(former | change))
        refused(tmp_path / "good", part)
    config.write_text("{")
    refused(tmp_path / "good", "JSON")
    config.unlink()
    refused(tmp_path / "good", "adapter_config.json")
    weights = tmp_path / "good" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    refused(tmp_path / "good", "damaged")
    refused_header = file("header.safetensors", {name: tensor.clone() for name, tensor in state.items()})
    save_file(load_file(refused_header), refused_header, metadata={"lora_adapter_metadata": "{"})
    refused(refused_header, "lora_adapter_metadata")


# Merging


@pytest.mark.parametrize("scale", [0.0, 0.35, 1.0, 1.5])
def test_a_merged_adapter_is_both(tmp_path: Path, scale: float) -> None:
    """Against the two adapters side by side in one network, in ours, peft's and diffusers' hands; they share some layers only."""
    base, inputs = tiny_wan(), Inputs()
    parts = []
    for index, (rank, alpha, targets) in enumerate([(3, 7.0, ("to_q", "ffn.net.2")), (2, 5.0, ("to_q", "to_v"))]):
        lora.save_adapter(tmp_path / str(index), adapted(copy_of(base), rank, alpha, targets))
        parts.append(lora.read_adapter(tmp_path / str(index)))
    both = copy_of(base)
    with torch.no_grad():
        for adapter, factor in zip(parts, (1.0, scale)):
            for name in adapter.modules:
                change = adapter.state[f"{name}.lora_B.weight"].double() @ adapter.state[f"{name}.lora_A.weight"].double()
                both.get_submodule(name).weight.add_((factor * adapter.alpha / adapter.rank * change).float())
    expected = inputs.through(both)
    assert (expected - inputs.through(base)).abs().max() > 0.01

    merged = lora.merge_adapters(*parts, scale)
    assert merged.rank == merged.alpha == 5
    lora.write_adapter(tmp_path / "merged", merged, base_model="toy")
    assert_close(inputs.through(lora.load_adapter(copy_of(base), tmp_path / "merged")), expected)
    assert_close(inputs.through(PeftModel.from_pretrained(copy_of(base), str(tmp_path / "merged"))), expected)
    theirs = as_diffusers(base)
    theirs.load_lora_adapter(load_file(tmp_path / "merged" / lora.DIFFUSERS_WEIGHTS), prefix="transformer")
    assert_close(inputs.through(theirs), expected)


def test_adapters_of_different_models_do_not_merge(tmp_path: Path) -> None:
    lora.save_adapter(tmp_path / "one", adapted(tiny_wan(), targets=("to_q",)))
    one = lora.read_adapter(tmp_path / "one")
    name = one.modules[0]
    wider = lora.Adapter({**one.state, f"{name}.lora_A.weight": torch.randn(RANK, 99)}, one.rank, one.alpha)
    with pytest.raises(UserError, match=rf"{name} go from 24 to 24 and 99 to 24.*one base model"):
        lora.merge_adapters(one, wider, 0.5)


def test_the_same_adapter_makes_the_same_bytes(tmp_path: Path) -> None:
    """safetensors alone writes metadata of several entries in an order that changes from file to file."""
    model = adapted(tiny_wan())
    for index in range(12):
        lora.save_adapter(tmp_path / str(index), model, base_model="some/base")
    written = [{file.name: file.read_bytes() for file in (tmp_path / str(index)).iterdir()} for index in range(12)]
    assert all(each == written[0] for each in written)
    with safe_open(tmp_path / "0" / lora.DIFFUSERS_WEIGHTS, "pt") as file:
        assert len(file.metadata()) > 1 and len(list(file.keys())) == len(lora.adapter_state(model))
