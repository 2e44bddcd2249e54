"""Adapters: what they compute, that nothing else trains, and that peft and diffusers read the files to the same outputs."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.lora import ALPHA, RANK, Inputs, adapted, assert_close, copy_of
from support.measure import LiveBytes
from support.models import TINY, tiny_wan
from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.model import lora
from arcopo_fast.model.adapter_files import Adapter
from arcopo_fast.model.causal_wan import CausalWan

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
    assert len(state) == 2 * 10 * TINY.num_layers  # ten linear layers in a block
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
    bound = TINY.dim**-0.5
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


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, -1.5])
def test_an_adapter_is_set_at_a_scale(scale: float) -> None:
    """Of a smaller rank, another alpha and fewer layers than the room it is put into: W + scale (alpha / rank) B A, in float64."""
    model, room = tiny_wan(), adapted(tiny_wan(), rank=5, alpha=4.0)
    adapter = Adapter(lora.adapter_state(adapted(model, targets=("to_q", "ffn.net.2"))), RANK, ALPHA)
    places = [parameter.data_ptr() for parameter in lora.adapter_parameters(room)]
    lora.set_adapter(room, adapter, scale)
    assert [parameter.data_ptr() for parameter in lora.adapter_parameters(room)] == places, "captured graphs read there"
    state = lora.adapter_state(room)
    for name in {key.rpartition(".lora_")[0] for key in state}:
        down, up = (state[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
        added, expected = 4.0 / 5 * up @ down, torch.zeros(len(up), down.shape[1], dtype=torch.float64)
        if name in adapter.modules:
            parts = (adapter.state[f"{name}.lora_{letter}.weight"].double() for letter in "BA")
            expected = scale * ALPHA / RANK * torch.linalg.multi_dot(list(parts))
        torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-7)


def test_without_an_adapter_the_room_adds_exactly_nothing() -> None:
    room, inputs = adapted(tiny_wan()), Inputs()
    plain = inputs.through(copy_of(room))
    assert not torch.equal(inputs.through(room), plain)
    lora.set_adapter(room, None)
    assert torch.equal(inputs.through(room), plain) and lora.adapter_enabled(room)
