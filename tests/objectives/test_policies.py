"""Named policies: whose weights a block computes with, what is put back after it, and copies that follow the live adapter."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from support.adapted import adapted_engine, fresh_engine
from support.models import random_text, small_model
from torch import Tensor, nn

from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.lora import adapter_parameters, adapter_state
from arcopo_fast.objectives import policies as module
from arcopo_fast.objectives.policies import Policies

LATENTS, TEXT = (1, 2, 8, 4, 6), (1, 5, 10)


@pytest.fixture
def model() -> CausalWan:
    return adapted_engine().model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the live adapter."""
    return {name: tensor.clone() for name, tensor in adapter_state(model).items()}


def move(model: nn.Module) -> dict[str, Tensor]:
    """Let the live adapter learn something; returns a copy of it."""
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return weights(model)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Output:
    """What a generator predicts of one input."""

    def __init__(self) -> None:
        self.latents, self.text = torch.randn(LATENTS), random_text()

    @torch.no_grad()
    def __call__(self, model: CausalWan) -> Tensor:
        return model(self.latents, torch.full((1, 2), 600.0), model.encode_text(self.text))


def test_a_block_computes_with_its_policy_and_puts_the_live_one_back(model: CausalWan) -> None:
    policies, output = Policies(model), Output()
    at_first, was = output(model), weights(model)
    policies.keep("old")
    live = move(model)
    now = output(model)
    places = [parameter.data_ptr() for parameter in adapter_parameters(model)]
    with policies.as_("old"):
        assert torch.equal(output(model), at_first) and same(weights(model), was)
        assert [parameter.data_ptr() for parameter in adapter_parameters(model)] == places, "captured graphs read there"
    with policies.as_("live"):
        assert torch.equal(output(model), now)
    assert torch.equal(output(model), now) and same(weights(model), live) and not torch.equal(now, at_first)


def test_the_reference_is_the_base(model: CausalWan) -> None:
    policies, output, now = Policies(model), Output(), weights(model)
    base = small_model()
    base.load_state_dict({name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name})
    with policies.as_("reference"):
        assert torch.equal(output(model), output(base))
    assert not torch.equal(output(model), output(base)) and same(weights(model), now)
    assert all(parameter.requires_grad for parameter in adapter_parameters(model))


@pytest.mark.parametrize("name", ["old", "reference", "live"])
def test_an_error_inside_a_block_leaves_the_live_policy_and_the_copies(name: str, model: CausalWan) -> None:
    policies, output = Policies(model), Output()
    policies.keep("old")
    was, live = weights(model), move(model)
    now = output(model)
    with pytest.raises(RuntimeError, match="inside"), policies.as_(name):
        raise RuntimeError("inside")
    assert same(weights(model), live) and torch.equal(output(model), now) and same(policies.state_dict()["old"], was)


def test_an_interrupt_while_weights_are_put_in_place_leaves_the_live_policy(model: CausalWan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the old weights must not stay: a checkpoint that is saved on the way out would hold them."""
    policies = Policies(model)
    policies.keep("old")
    live, put = move(model), module.load_adapter_state
    interrupts = iter([True, False])

    def half(target: nn.Module, state: dict[str, Tensor]) -> None:
        if next(interrupts):
            names = list(state)[: len(state) // 2]
            put(target, live | {name: state[name] for name in names})
            raise KeyboardInterrupt
        put(target, state)

    monkeypatch.setattr(module, "load_adapter_state", half)
    with pytest.raises(KeyboardInterrupt), policies.as_("old"):
        pytest.fail("the block must not be entered")
    assert same(weights(model), live)


@pytest.mark.parametrize("error", [False, True])
def test_blocks_may_be_nested(error: bool, model: CausalWan) -> None:
    """Each block computes with its own policy and puts the one around it back, an error or not."""
    policies, output, seen = Policies(model), Output(), {}
    for name in ("first", "second"):
        policies.keep(name)
        seen[name] = output(model)
        move(model)
    live, now = weights(model), output(model)
    with policies.as_("reference"):
        seen["reference"] = output(model)
    with policies.as_("first"):
        for inner in ("second", "reference", "second"):
            with ExitStack() as stack:
                if error:
                    stack.enter_context(pytest.raises(RuntimeError, match="inside"))
                stack.enter_context(policies.as_(inner))
                assert torch.equal(output(model), seen[inner])
                if error:
                    raise RuntimeError("inside")
            assert torch.equal(output(model), seen["first"])
    assert same(weights(model), live) and torch.equal(output(model), now)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.99, 1.0])
def test_a_policy_that_follows_is_the_moving_average_of_the_formula(rate: float, model: CausalWan) -> None:
    """In float64: old <- rate old + (1 - rate) live."""
    policies = Policies(model)
    policies.keep("old")
    expected = {name: tensor.double() for name, tensor in weights(model).items()}
    for _ in range(3):
        live = move(model)
        policies.decay("old", rate)
        expected = {name: rate * tensor + (1 - rate) * live[name].double() for name, tensor in expected.items()}
        assert same(weights(model), live), "the live adapter does not follow"
    for name, tensor in policies.state_dict()["old"].items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)
    assert policies.is_live("old") == (rate == 0)


def test_which_policies_are_the_live_one(model: CausalWan) -> None:
    policies = Policies(model)
    assert "live" in policies and "reference" in policies and "old" not in policies
    assert policies.is_live("live") and not policies.is_live("reference")
    policies.keep("old")
    assert "old" in policies and policies.is_live("old")
    with torch.no_grad():  # one element of one matrix, by its last bit
        element = adapter_parameters(model)[-1].view(-1)[-1]
        element.copy_(element.nextafter(torch.tensor(9.0)))
    assert not policies.is_live("old") and policies.is_live("live")
    policies.keep("old")
    assert policies.is_live("old")
    policies.drop("old")
    policies.drop("old")
    assert "old" not in policies and policies.state_dict() == {}
    assert Policies(fresh_engine().model).is_live("reference"), "an adapter whose B is zero adds exactly nothing"


def test_the_copies_are_saved_and_restored(model: CausalWan) -> None:
    policies = Policies(model)
    policies.keep("old")
    was = weights(model)
    move(model)
    policies.keep("older still")
    saved = {name: {key: tensor.clone() for key, tensor in kept.items()} for name, kept in policies.state_dict().items()}
    other = adapted_engine().model
    before, restored = weights(other), Policies(other)
    restored.keep("of before")
    restored.load_state_dict(saved)
    assert restored.state_dict().keys() == {"old", "older still"} and same(weights(other), before)
    assert same(restored.state_dict()["old"], was)
    with restored.as_("old"):
        assert same(weights(other), was)
    restored.decay("old", 0.5)  # what moves is the restored copy, not what was read
    assert same(saved["old"], was) and not same(restored.state_dict()["old"], was)
