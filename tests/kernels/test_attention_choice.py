"""Who attends to which segment: the choice, the backends that need a GPU as far as they can be tried without, and what is said of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from arcopo_kernels import Choice, Segment, dispatch, segment_attention
from arcopo_kernels.attention import backends, chosen, hub, slow_on_hopper
from arcopo_kernels.attention.backends import BACKENDS, Backend
from arcopo_kernels.testing import assert_close
from support.attention import OWN, PREFIX, WINDOW, dense, differentiate, draw, leaves
from support.pages import append, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def result(query: Tensor, segments: Sequence[Segment], backend: str) -> dict[str, Tensor]:
    out = segment_attention(query, segments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return {"output": out, **differentiate(out, grad_out, leaves(query, segments))}


def test_a_length_that_a_backend_refuses_costs_that_segment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
        return f"it refuses {key.shape[1]} keys" if key.shape[1] == WINDOW.keys else None

    attended: list[int] = []

    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        attended.append(key.shape[1])
        return BACKENDS["math"].forward(query, key, value, scale)

    monkeypatch.setitem(BACKENDS, "picky", Backend(unsupported, forward, BACKENDS["math"].backward))
    monkeypatch.setattr(backends, "AUTO_ON_CPU", ("picky", "math"))
    query, segments = draw(3, 11, [PREFIX, WINDOW, OWN])
    expected, ours = result(query, segments, "math"), result(query, segments, "auto")
    assert attended == [PREFIX.keys, OWN.keys]
    for name, tensor in ours.items():
        assert_close(name, tensor, expected[name], 1e-12)
    assert_close("output", ours["output"], dense(query, segments), 1e-12)
    used = dispatch.used("segment_attention")
    reason = "picky for some segments: the first choice; math for some segments: not picky: it refuses 7 keys"
    assert used == Choice("picky and math", reason) == chosen(query, segments)


def test_what_is_chosen_is_said_without_running_it() -> None:
    query, segments = draw(2, 5, [PREFIX, OWN], torch.float32)
    assert chosen(query, segments) == Choice("cpu", "the first choice")
    assert chosen(query, segments, "math") == Choice("math", "asked for")
    with pytest.raises(ValueError, match="cudnn"):
        chosen(query, segments, "cudnn")


def test_a_slow_attention_on_hopper_is_said_in_one_line() -> None:
    refused = Choice("flash", "not cudnn: cuDNN 91002 may read past the end")
    line = slow_on_hopper(refused, (9, 0))
    assert line is not None and "flash" in line and "may read past the end" in line and "\n" not in line
    mixed = slow_on_hopper(Choice("cudnn and flash", "..."), (10, 0))
    assert mixed is not None and "on flash," in mixed
    assert slow_on_hopper(refused, (8, 0)) is None
    assert all(slow_on_hopper(Choice(name, "the first choice"), (9, 0)) is None for name in ("cudnn", "fa3", "fa4", "kernels"))


@pytest.mark.parametrize("trained", [True, False])
def test_the_memory_efficient_operator_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    """A stand-in does as PyTorch's kernels do, whose log-sum-exps are padded to a multiple of 32 queries; numbers are for a GPU, too."""
    aten, math = torch.ops.aten, BACKENDS["math"]
    schema = aten._scaled_dot_product_efficient_attention_backward.default._schema
    names = "value attn_bias out logsumexp philox_seed philox_offset dropout_p grad_input_mask is_causal"
    assert [argument.name for argument in schema.arguments][3:12] == names.split()

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: None, with_lse: bool, *, scale: float) -> tuple[Tensor, ...]:
        out, lse = math.forward(*backends._heads_first(query, key, value), scale)
        assert bias is None and with_lse
        return out.transpose(1, 2), torch.cat([lse, lse.new_full((*lse.shape[:2], 27), torch.nan)], dim=2), *torch.empty(2, 0)

    def backward(*arguments: Any, scale: float) -> tuple[Tensor | None, ...]:
        *tensors, bias, out, lse, _, _, dropout, wanted = arguments
        assert bias is None and dropout == 0 and wanted == [True, trained, trained, False] and (lse[..., 37:] == torch.inf).all()
        assert lse.shape[2] == 64 and lse.is_contiguous()
        grads = math.backward(*backends._heads_first(*tensors, out), lse[..., :37], scale, trained)
        return *(grad if grad is None else grad.transpose(1, 2) for grad in grads), None

    query, key, value = (torch.randn(2, tokens, 3, 16, dtype=torch.float64) for tokens in (37, 41, 41))
    out, lse = math.forward(query, key, value, 0.25)
    expected = math.backward(out.cos(), query, key, value, out, lse, 0.25, trained)
    monkeypatch.setattr(aten, "_scaled_dot_product_efficient_attention", forward)
    monkeypatch.setattr(aten, "_scaled_dot_product_efficient_attention_backward", backward)
    ours, our_lse = BACKENDS["efficient"].forward(query, key, value, 0.25)
    assert torch.equal(ours, out) and torch.equal(our_lse, lse)
    for ours, grad in zip(BACKENDS["efficient"].backward(out.cos(), query, key, value, out, lse, 0.25, trained), expected, strict=True):
        assert (ours is None and grad is None) or torch.equal(ours, grad)


def test_what_the_memory_efficient_operator_refuses() -> None:
    """On a GPU that need not be there."""
    with FakeTensorMode():
        odd = torch.empty(2, 37, 3, 18, device="cuda")
        assert "head_dim 18 is not a multiple of 4" in str(BACKENDS["efficient"].unsupported(odd, odd, odd))
        wide = torch.empty(2, 37, 3, 16, device="cuda", dtype=torch.float64)
        assert "float64" in str(BACKENDS["efficient"].unsupported(wide, wide, wide))
    assert "on cpu" in str(BACKENDS["efficient"].unsupported(*(torch.empty(1, 1, 1, 8),) * 3))


def three(math: Backend) -> dict[str, Any]:
    """FlashAttention 3's functions, by plain PyTorch."""

    def forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, ...]:
        return *math.forward(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)

    def backward(dq: Tensor, dk: Tensor, dv: Tensor, is_causal: bool, **given: Any) -> Tensor:
        tensors = [given[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse")]
        for target, grad in zip((dq, dk, dv), math.backward(*tensors, given["softmax_scale"], True)):
            target.copy_(grad)  # type: ignore[arg-type]
        return torch.empty(0)

    return {"_flash_attn_forward": forward, "_flash_attn_backward": backward}


def four(math: Backend) -> dict[str, Any]:
    """FlashAttention 4's functions, by plain PyTorch."""

    def forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, return_lse: bool) -> tuple[Tensor, ...]:
        assert return_lse
        return math.forward(q, k, v, softmax_scale)

    def backward(causal: bool, **given: Any) -> Any:
        return math.backward(*(given[name] for name in ("dout", "q", "k", "v", "out", "lse", "softmax_scale")), True)

    return {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}


@pytest.mark.parametrize(("functions", "below"), [(three, ""), (three, ".flash_attn_interface"), (four, ".interface")])
def test_a_build_of_others_is_used_where_a_repository_is_named(functions: Any, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, place = ModuleType("a_build"), ModuleType("a_build" + below)
    module.__path__ = []
    place = place if below else module
    for name, function in functions(BACKENDS["math"]).items():
        setattr(place, name, function)
    monkeypatch.setitem(sys.modules, "a_build", module)
    monkeypatch.setitem(sys.modules, place.__name__, place)
    asked: list[str] = []
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda name: asked.append(name) or module))
    monkeypatch.setattr(backends, "_half_on_nvidia", lambda query: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backends, "AUTO_ON_CPU", ("kernels", "math"))
    hub.build.cache_clear()
    query, segments = draw(2, 11, [PREFIX, OWN])
    assert chosen(query, segments) == Choice("math", f"not kernels: {hub.VARIABLE} names no repository of builds")
    monkeypatch.setenv(hub.VARIABLE, "someone/flash-attn3")
    ours, expected = result(query, segments, "auto"), result(query, segments, "math")
    assert chosen(query, segments).name == "kernels" and asked == ["someone/flash-attn3"], "fetched once"
    for name, tensor in ours.items():
        assert_close(name, tensor, expected[name], 1e-12)
    hub.build.cache_clear()


def test_a_build_that_cannot_be_had_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_kernel(name: str) -> Any:
        raise FileNotFoundError("no build for torch 2.13")

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setenv(hub.VARIABLE, "someone/flash-attn3")
    hub.build.cache_clear()
    assert hub.missing() == "someone/flash-attn3: FileNotFoundError: no build for torch 2.13"
    module = ModuleType("an_empty_build")
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda name: module))
    assert "neither" in str(hub.missing())
    hub.build.cache_clear()


def test_pages_reach_a_backward_with_strides_that_cudnn_takes() -> None:
    """Its backward takes the strides as they are: none may be zero where there is more than one of a kind, rows must lie together, and
    heads must begin at multiples of 16 bytes."""
    pool = make(3 + 4 * 2)
    parent = pool.table()
    append(pool, [parent], 3)
    branches = [parent.fork() for _ in range(4)]
    append(pool, branches, 2)
    runs = [*pool.runs(branches), *pool.runs([parent]), *pool.runs(branches[:1])]
    assert {run.rows for run in runs} == {1, 4}
    for run in runs:
        for tensor in pool.read(0, run):
            (view,) = backends._heads_first(tensor)
            batch, heads, _, dim = view.shape
            stride = view.stride()
            assert stride[3] == 1 and stride[1] == dim and stride[2] == heads * dim, "as the model's own heads lie"
            assert stride[0] > 0 and (batch == 1 or stride[0] >= view[0].numel()), "a shared run is no expanded one"
