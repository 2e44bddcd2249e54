"""An operator's body is called directly, except where a compiler, a mode, a transform or autograd must see the call."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from arcopo_kernels import Segment, dispatch, segment_attention
from arcopo_kernels.attention import op
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def registered_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of the attention operator that went through PyTorch's dispatcher."""
    calls: list[str] = []
    registered = op._forward.registered

    def recorded(*arguments: Any) -> Any:
        calls.append("segment_attention")
        return registered(*arguments)

    monkeypatch.setattr(op._forward, "registered", recorded)
    return calls


OPERATORS = ("attention", "lora_linear", "modulation", "nft", "norm_silu", "paging", "qk_norm_rope", "surrogate")


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_called_directly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each registration with PyTorch goes through `dispatch.operator`, and a call without gradient arrives at the body."""
    module = import_module(f"arcopo_kernels.{name}.op")
    assert "torch.library" not in "".join(line for line in inspect.getsource(module).splitlines() if line.startswith("@"))
    operators = [value for value in vars(module).values() if isinstance(value, dispatch.Operator)]
    assert operators
    for operator in operators:
        monkeypatch.setattr(operator, "body", lambda *arguments: arguments)
        target = torch.zeros(2)
        arguments = [target for _ in range(len(operator.mutated) + 9)]
        version = target._version
        assert operator(*arguments) == tuple(arguments)
        assert target._version == version + len(operator.mutated)


def attend(query: Tensor) -> Tensor:
    return segment_attention(query, [Segment(query, query)])


def test_nothing_is_registered_for_a_call_without_gradient(registered_calls: list[str]) -> None:
    query = torch.randn(2, 5, 3, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(*[query.transpose(1, 2)] * 3).transpose(1, 2)
    torch.testing.assert_close(attend(query), expected)
    with torch.no_grad():
        torch.testing.assert_close(attend(query.requires_grad_()), expected)
    with torch.inference_mode():
        torch.testing.assert_close(attend(query), expected)
    assert not registered_calls


def test_autograd_and_modes_see_the_operator(registered_calls: list[str]) -> None:
    query = torch.randn(2, 5, 3, 8)
    assert attend(query.clone().requires_grad_()).grad_fn is not None
    assert len(registered_calls) == 1
    with FakeTensorMode() as mode:
        fake = attend(mode.from_tensor(query))
    assert fake.shape == query.shape and type(fake) is not Tensor
    assert type(attend(fake)) is type(fake), "a fake tensor outside of its mode"
    nodes = make_fx(attend)(query).graph.nodes
    assert torch.ops.arcopo.segment_attention.default in [node.target for node in nodes]
    with FlopCounterMode(display=False):
        attend(query)
    assert len(registered_calls) == 5


def test_compilers_see_the_operator() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return module

    query = torch.randn(2, 5, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend=keep)(query), attend(query), rtol=0, atol=0)
    assert any("segment_attention" in str(node.target) for node in graphs[0].graph.nodes)


def test_transforms_see_the_operator(registered_calls: list[str]) -> None:
    query = torch.randn(4, 2, 5, 3, 8)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):  # refused, not computed wrongly
        torch.vmap(attend)(query)
    assert len(registered_calls) == 1


def test_a_saved_tensor_that_an_operator_overwrites_is_noticed() -> None:
    @dispatch.operator("overwrite_for_a_test", mutates=("target",))
    def overwrite(source: Tensor, target: Tensor) -> None:
        target.numpy()[:] = source.numpy()  # as a kernel does: PyTorch does not see it

    weight, target = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = (weight * target).sum()
    overwrite(torch.zeros(3), target)
    assert not target.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
