"""Adapters: what they compute, that nothing else trains, and that peft and diffusers read the files to the same outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils import load_peft_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.measure import LiveBytes
from support.models import small_config
from support.official import official_name
from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.model import lora
from arcopo_fast.model.causal_wan import CausalWan

CONFIG = small_config(in_channels=4, out_channels=4)
RANK, ALPHA = 3, 7.0  # alpha / rank is neither 1 nor a power of two
ROUNDING = 2e-5  # of the largest value


def tiny_wan() -> CausalWan:
    model = CausalWan(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def copy_of(model: CausalWan) -> CausalWan:
    """A plain model with the same base weights."""
    plain = CausalWan(CONFIG)
    plain.load_state_dict({name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name})
    return plain


def adapted(model: CausalWan, rank: int = RANK, alpha: float = ALPHA, targets: tuple[str, ...] = lora.BLOCK_TARGETS) -> CausalWan:
    lora.add_lora(model, rank=rank, alpha=alpha, targets=targets, seed=5)
    for parameter in lora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def as_diffusers(model: CausalWan) -> WanTransformer3DModel:
    """diffusers' network with the same base weights."""
    sizes = {name: value for name, value in CONFIG.to_dict().items() if name != "text_len"}
    theirs = WanTransformer3DModel(**sizes).eval()
    theirs.load_state_dict(copy_of(model).state_dict())
    return theirs


class Inputs:
    """One first chunk, for our network and for diffusers'."""

    def __init__(self) -> None:
        self.latents, self.text = torch.randn(2, 3, 4, 8, 6), torch.randn(2, CONFIG.text_len, CONFIG.text_dim)
        self.timestep = 1000 * torch.rand(2, 1)

    @torch.no_grad()
    def through(self, model: nn.Module) -> Tensor:
        if isinstance(model, WanTransformer3DModel):
            return model(self.latents.transpose(1, 2), self.timestep[:, 0], self.text).sample.transpose(1, 2)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return model(self.latents, self.timestep, base.encode_text(self.text))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= ROUNDING, f"{error:.1e} of the largest value"


# In a module


def test_an_adapter_is_a_low_rank_change_of_the_weights() -> None:
    model, inputs = tiny_wan(), Inputs()
    merged = copy_of(model)
    base_output = inputs.through(model)
    assert lora.add_lora(model, rank=RANK, alpha=ALPHA, seed=5) is model and isinstance(model, CausalWan)
    assert torch.equal(inputs.through(model), base_output)  # B starts at zero
    for parameter in lora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    state = lora.adapter_state(model)
    assert len(state) == 2 * 10 * CONFIG.num_layers  # ten linear layers in a block
    for name in state:
        if ".lora_A." in name:
            module = name.removesuffix(".lora_A.weight")
            change = ALPHA / RANK * state[f"{module}.lora_B.weight"] @ state[name]
            merged.get_parameter(f"{module}.weight").data += change
    output = inputs.through(model)
    assert_close(output, inputs.through(merged))
    assert (output - base_output).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_float32_adapters_train(dtype: torch.dtype) -> None:
    model = adapted(tiny_wan().to(dtype))
    parameters = lora.adapter_parameters(model)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in parameters)
    assert all(p.dtype == dtype for p in model.parameters() if not p.requires_grad)
    inputs = Inputs()
    output = model(inputs.latents, inputs.timestep, model.encode_text(inputs.text))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_adapters_over_a_half_precision_base_compute_in_it() -> None:
    """Within bfloat16's rounding of the exact result, with exact gradients in float32, and no float32 copy of an input is kept."""
    linear = nn.Sequential(nn.Linear(48, 40, dtype=torch.bfloat16))
    lora.add_lora(linear, rank=RANK, alpha=ALPHA, targets=["0"], seed=1)
    down, up = lora.adapter_parameters(linear)
    nn.init.normal_(up, std=0.3)
    x, grad_out = torch.randn(100, 48).bfloat16(), torch.randn(100, 40).bfloat16()
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.dtype) if t.numel() >= x.numel() else None, t)[1], lambda t: t):
        output = linear(x)
    output.backward(grad_out)
    assert output.dtype == torch.bfloat16 and set(kept) == {torch.bfloat16}

    exact = [t.detach().double().requires_grad_() for t in (down, up)]
    base = linear[0].base_layer
    expected = x.double() @ base.weight.double().T + base.bias.double() + ALPHA / RANK * x.double() @ exact[0].T @ exact[1].T
    expected.backward(grad_out.double())
    for ours, theirs in ((output, expected), (down.grad, exact[0].grad), (up.grad, exact[1].grad)):
        assert ours is not None and theirs is not None
        assert (ours.double() - theirs).norm() <= 2e-2 * theirs.norm()
    assert down.grad is not None and down.grad.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 1, 3), (0, 4)], ids=str)
def test_gradients_of_an_adapted_layer(shape: tuple[int, ...], bias: bool) -> None:
    """Against autograd through the formula, exactly, whether the input wants a gradient or not."""
    layer = nn.Sequential(nn.Linear(6, 5, bias=bias, dtype=torch.float64))
    lora.add_lora(layer, rank=RANK, alpha=ALPHA, targets=["0"], seed=1, dtype=torch.float64)
    down, up = lora.adapter_parameters(layer)
    nn.init.normal_(up)
    weight, offset = layer[0].base_layer.weight, layer[0].base_layer.bias
    x, grad_out = torch.randn(*shape, 6, dtype=torch.float64), torch.randn(*shape, 5, dtype=torch.float64)
    for wanted in (True, False):
        leaves = [x, down, up] if x.requires_grad_(wanted).requires_grad else [down, up]
        ours = layer(x)
        theirs = x @ (weight + ALPHA / RANK * up @ down).T + (0 if offset is None else offset)
        pairs = zip((ours, *torch.autograd.grad(ours, leaves, grad_out)), (theirs, *torch.autograd.grad(theirs, leaves, grad_out)))
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_else_peft_does_with_a_layer_it_does() -> None:
    """Merging into the base and back, another scaling, a second adapter beside the first."""
    layer = nn.Sequential(nn.Linear(6, 5))
    lora.add_lora(layer, rank=RANK, alpha=ALPHA, targets=["0"], seed=1)
    down, up = lora.adapter_parameters(layer)
    nn.init.normal_(up)
    x, base = torch.randn(7, 6), layer[0].base_layer
    change = ALPHA / RANK * x @ (up @ down).T
    expected = (base(x) + change).detach()
    layer[0].merge()
    torch.testing.assert_close(layer(x), expected)
    layer[0].unmerge()
    torch.testing.assert_close(layer(x), expected)
    layer[0].set_scale("default", 0.5)
    torch.testing.assert_close(layer(x), base(x) + 0.5 * change)
    layer[0].set_scale("default", 1.0)
    second = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    inject_adapter_in_model(second, layer, adapter_name="second")
    layer[0].set_adapter(["default", "second"])
    other = x @ (layer[0].lora_B["second"].weight @ layer[0].lora_A["second"].weight).T
    torch.testing.assert_close(layer(x), base(x) + change + other)


def test_an_adapter_is_added_in_place() -> None:
    """Of tensors as large as the output there is the output alone, forward; backward there is the gradient of the input alone."""
    layer = nn.Sequential(nn.Linear(64, 48))
    lora.add_lora(layer, rank=2, alpha=ALPHA, targets=["0"], seed=1)
    x = torch.randn(1000, 64, requires_grad=True)
    live = LiveBytes([x, *layer.parameters()])
    with live:
        output = layer(x)
    assert live.peak <= output.nbytes + 1000 * 2 * 4
    grad_out = torch.randn_like(output)
    live = LiveBytes([x, output, grad_out, *layer.parameters(), *output.grad_fn.saved_tensors])  # type: ignore[union-attr]
    with live:
        output.backward(grad_out)
    assert live.peak <= x.nbytes + 1000 * 2 * 4 + sum(2 * p.nbytes for p in lora.adapter_parameters(layer))


def test_initial_values_depend_on_the_seed_and_the_layer_alone() -> None:
    base = tiny_wan()

    def initial(seed: int, targets: tuple[str, ...]) -> dict[str, Tensor]:
        return lora.adapter_state(lora.add_lora(copy_of(base), rank=RANK, alpha=ALPHA, targets=targets, seed=seed))

    first = initial(5, ("to_q",))
    torch.rand(3)
    second = initial(5, ("to_q", "attn1.to_k"))
    assert set(first) < set(second)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    other = initial(6, ("to_q",))
    downs = [name for name in first if ".lora_A." in name]
    assert len(downs) == 4 and all(not torch.equal(first[name], other[name]) for name in downs)
    assert len({first[name].sum().item() for name in downs}) == 4
    bound = CONFIG.dim**-0.5
    assert all(0.5 * bound < first[name].abs().max() <= bound for name in downs)  # peft's range


def test_the_global_generator_is_left_alone() -> None:
    model = tiny_wan()
    before = torch.get_rng_state()
    lora.add_lora(model, rank=RANK, alpha=ALPHA, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_disabled_is_the_base_and_leaves_no_trace() -> None:
    model, inputs = tiny_wan(), Inputs()
    base_output = inputs.through(model)
    output = inputs.through(adapted(model))
    frozen = lora.adapter_parameters(model)[0].requires_grad_(False)
    with lora.adapter_disabled(model):
        assert torch.equal(inputs.through(model), base_output)
        with lora.adapter_disabled(model):
            pass
        assert torch.equal(inputs.through(model), base_output)
    with pytest.raises(KeyboardInterrupt), lora.adapter_disabled(model):
        raise KeyboardInterrupt
    assert torch.equal(inputs.through(model), output)
    assert [p.requires_grad for p in lora.adapter_parameters(model)] == [p is not frozen for p in lora.adapter_parameters(model)]


def test_wrong_requests_are_named() -> None:
    def refused(*parts: str, **changes: object) -> None:
        arguments: dict[str, object] = {"rank": RANK, "alpha": ALPHA, "targets": ("to_q",), "seed": 5} | changes
        with pytest.raises(UserError) as error:
            lora.add_lora(tiny_wan(), **arguments)  # type: ignore[arg-type]
        for part in parts:
            assert part in str(error.value)

    refused("'to_qq'", "attn1.to_q, ", "ffn.net.0.proj", "proj_out", targets=("to_q", "to_qq"))
    refused("'norm_q'", targets=("norm_q",))
    refused("at least one", targets=())
    refused("rank 0", rank=0)
    refused("alpha -1", alpha=-1)
    with pytest.raises(ValueError, match="already"):
        lora.add_lora(adapted(tiny_wan()), rank=RANK, alpha=ALPHA, seed=5)


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
    for part in ("some/file", f"1 missing ({first})", "1 unexpected (x)", f"1 of another shape ({second})"):
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
