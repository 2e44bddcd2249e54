"""Kernels run on the GPU that holds their tensors, whichever is the current one."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest
import torch
from arcopo_kernels import PagePool, Segment, copo_surrogate, dispatch, nft_loss, segment_attention
from arcopo_kernels.aot import OPERATORS
from arcopo_kernels.device import INTERPRETER_TARGET, on_device_of_tensors, target_of
from arcopo_kernels.lora_linear import lora_linear
from arcopo_kernels.modulation import gated_residual_layer_norm_modulate
from arcopo_kernels.norm_silu import norm_silu
from arcopo_kernels.qk_norm_rope import qk_norm_rope
from torch import Tensor

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")


def test_the_device_is_that_of_the_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Tensor] = []
    before = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: (entered.append(x), before(x))[1])
    launcher: Callable[..., int] = on_device_of_tensors(lambda *args, scale=1: scale * len(args))
    x, y = torch.randn(2, 3).unbind()
    assert launcher(None, 3.0, x, y) == 4 and launcher([y, x], scale=2) == 2
    assert entered[0] is x and entered[1] is y


@pytest.mark.parametrize(
    ("hip", "gpu", "target"), [(None, (8, 9), "sm_89"), (None, (12, 0), "sm_120"), ("7.0", "gfx942:sramecc+", "gfx942")]
)
def test_the_target_is_that_of_the_tensors_gpu(hip: str | None, gpu: Any, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert target_of(torch.zeros(1)) == INTERPRETER_TARGET
    second: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {second.device: gpu}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {second.device: SimpleNamespace(gcnArchName=gpu)}.__getitem__)
    assert target_of(second) == target


@needs_triton
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_launcher_says_so(operator: str) -> None:
    """What `op.py` and `backends.py` call are the functions without an underscore that take tensors."""
    module = import_module(f"arcopo_kernels.{operator}.triton")
    helpers = {"aot_cases", "block_sizes", "chunk", "unsupported"}
    launchers = {name: f for name, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__}
    launchers = {name: f for name, f in launchers.items() if name[0] != "_" and name not in helpers and not isinstance(f, type)}
    assert launchers and all(hasattr(f, "__wrapped__") for f in launchers.values()), sorted(launchers)


def calls(device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Outputs and gradients of every operator's kernels, one operator after another."""

    def new(*shape: int, **kwargs: Any) -> Tensor:
        return torch.randn(shape, device=device, **kwargs).requires_grad_()

    query, key = new(2, 6, 2, 16), new(2, 6, 2, 16)
    out = segment_attention(query, [Segment(key, key), Segment(key[:1], key[:1], True)], backend="triton")
    yield out, *torch.autograd.grad(out.square().sum(), (query, key))
    weights = new(32), new(32)
    outs = qk_norm_rope(query, key, *weights, grid=(1, 2, 3))
    yield *outs, *torch.autograd.grad(outs[0].square().sum() + outs[1].square().sum(), (query, key, *weights))
    x, gate = new(2, 1, 3, 24), new(2, 1, 1, 24)
    outs = gated_residual_layer_norm_modulate(x, x, gate, scale=gate)
    yield *outs, *torch.autograd.grad(outs[1].square().sum(), (x, gate))
    yield (norm_silu(x.detach(), gate.detach()[0, 0, 0]),)
    rows, down, up = new(5, 24), new(2, 24), new(7, 2)
    out = lora_linear(rows, new(7, 24).detach(), None, down, up, gelu=True)
    yield out, *torch.autograd.grad(out.square().sum(), (rows, down, up))
    pred, old_pred, candidates = new(2, 40), new(2, 40), new(1, 3, 40)
    surrogate = copo_surrogate(pred, old_pred, candidates, torch.tensor([1.0, -1.0, 0.5], device=device))
    yield surrogate.loss, *torch.autograd.grad(surrogate.loss.sum(), pred)
    loss = nft_loss(pred, old_pred, pred.detach() + 1, torch.tensor([0.2, 0.9], device=device), beta=0.5).loss
    yield loss, *torch.autograd.grad(loss.sum(), pred)
    pool = PagePool(layers=2, pages=4, tokens_per_page=3, heads=2, head_dim=16, dtype=torch.float32, device=device)
    pool.keys.normal_(), pool.values.normal_()
    first = pool.table()
    first.extend(pool.allocate(1))
    forked = first.fork()
    (run,) = pool.prepare_write([forked], 0, 1)
    yield pool.keys[:, run.pages[0]], pool.keys[:, first.pages[0]]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu() -> None:
    results = []
    for current in (0, 1):
        torch.manual_seed(0)
        with torch.cuda.device(current), dispatch.use("triton"):
            torch.cuda.manual_seed_all(0)
            results.append(list(calls(torch.device("cuda:1"))))
            torch.cuda.synchronize("cuda:1")
    for outputs in zip(*results):
        assert all(torch.equal(a, b) and a.device.index == 1 for a, b in zip(*outputs))
