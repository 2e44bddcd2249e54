"""Segment attention on a GPU, at the model's head count and width. Lengths are no multiple of any tile."""

from __future__ import annotations

from typing import Any, Sequence

import pytest
import torch
from arcopo_kernels import Segment, dispatch, segment_attention
from arcopo_kernels.attention import backends
from arcopo_kernels.testing import assert_close, assert_no_worse
from support.attention import OWN, PREFIX, WINDOW, Run, check, dense, differentiate, draw, in_double, leaves, plain
from support.graphs import captured
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# On a GPU, at the model's head count and width. Lengths are no multiple of any tile.

gpu = pytest.mark.gpu
GPU_RUNS = [Run(2340, True, True), Run(390, True, False), Run(1170, False, False)]


def gpu_backend(name: str, runs: Sequence[Run] = GPU_RUNS) -> tuple[Tensor, list[Segment]]:
    """A realistic call; skips where the backend is not there. PyTorch's own must take it: a refusal of theirs is a failure."""
    query, segments = draw(3, 1170, runs, torch.bfloat16, heads=12, head_dim=128, device="cuda")
    try:
        backends.choose(name, query, [(segment.key, segment.value) for segment in segments])
    except ValueError as error:
        if name in ("math", "flash", "efficient", "triton") or (name == "cudnn" and torch.cuda.get_device_capability() >= (9, 0)):
            raise
        pytest.skip(str(error))
    return query, segments


FUSED = ["cudnn", "flash", "efficient", "triton", "flash_attn", "kernels"]


@gpu
@pytest.mark.parametrize("backend", FUSED)
def test_gpu_error(backend: str) -> None:
    check(backend, *gpu_backend(backend))


@gpu
def test_gpu_float32_keeps_no_scores() -> None:
    query, segments = draw(2, 390, GPU_RUNS, torch.float32, heads=12, head_dim=128, device="cuda")
    segment_attention(query, segments)
    used = dispatch.used("segment_attention")
    assert used is not None and used.name == "efficient"
    check("efficient", query, segments)


@gpu
@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_gpu_one_token_segments(backend: str) -> None:
    check(backend, *gpu_backend(backend, [Run(1, True, True), Run(1, False, False), Run(129, False, False)]))


@gpu
@pytest.mark.parametrize("backend", FUSED)
def test_gpu_pool_views(backend: str) -> None:
    """Branches whose own keys lie apart in a pool, trained and frozen."""
    query, _ = gpu_backend(backend)
    pool = torch.randn(2, 5, 3 * 390, 12, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    segments = [Segment(pool[0, :1], pool[1, :1], True), Segment(pool[0, 1:4, :780], pool[1, 1:4, :780])]
    out = segment_attention(query, segments, backend=backend)
    plain_out = plain(query, segments)
    exact_query, exact_segments = in_double(query, segments)
    exact_out = dense(exact_query, exact_segments)
    assert_no_worse("output", out, plain_out, exact_out)
    grad_out = torch.randn_like(query)
    own = segments[1]
    ours, same_precision = (torch.autograd.grad(result, [query, own.key, own.value], grad_out) for result in (out, plain_out))
    exact = torch.autograd.grad(exact_out, [exact_query, exact_segments[1].key, exact_segments[1].value], grad_out.double())
    for name, a, b, c in zip(("query", "key", "value"), ours, same_precision, exact):
        assert_no_worse(f"gradient of {name}", a, b, c)


@gpu
@pytest.mark.parametrize("backend", FUSED)
def test_gpu_expanded_keys(backend: str) -> None:
    query, (shared, _) = gpu_backend(backend, [Run(390, True, False), OWN])
    trained = Segment(*(tensor.expand(3, -1, -1, -1) for tensor in shared[:2]))
    grad_out, inputs = torch.randn_like(query), [query, shared.key, shared.value]
    exact_query, (exact_shared,) = in_double(query, [shared])
    outs = [segment_attention(query, [trained], backend=backend), plain(query, [shared]), dense(exact_query, [exact_shared])]
    of = [inputs, inputs, [exact_query, exact_shared.key, exact_shared.value]]
    gradients = [torch.autograd.grad(out, leaves, grad_out.to(out.dtype)) for out, leaves in zip(outs, of)]
    assert_no_worse("output", *outs, slack=1e-3)
    for name, *each in zip(("query", "key", "value"), *gradients):
        assert_no_worse(f"gradient of {name}", *each, slack=1e-3)


FINE = {"version": 91900, "queries": 130}


@pytest.mark.parametrize(
    "call, said",
    [
        ({}, None),
        ({"queries": 1}, "one query"),
        ({"version": 91002}, "9.15.1"),
    ],
)
def test_known_faults_of_cudnn_are_avoided(call: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", raising=False)
    reason = backends.cudnn_fault(**{**FINE, **call})
    assert reason is None if said is None else said in str(reason)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert backends.cudnn_fault(**FINE) is not None


def test_a_kernel_that_does_not_pad_says_so() -> None:
    """A head_dim that PyTorch's own function would pad, on a GPU that need not be there."""
    with FakeTensorMode():
        query = torch.empty(2, 37, 1, 20, dtype=torch.bfloat16, device="cuda")
        assert "head_dim 20 is not a multiple of 8" in str(backends.BACKENDS["flash"].unsupported(query, query, query))


@gpu
@pytest.mark.parametrize("backend", FUSED)
def test_gpu_offsets_beyond_32_bits(backend: str) -> None:
    """Branches that lie 2^31 elements apart, as in a large pool."""
    query, (own,) = gpu_backend(backend, [Run(130, False, False)])
    row = own.key.stride(1)
    pool = torch.empty(2 * (2**31 + 2 * row) + own.key[0].numel(), dtype=torch.bfloat16, device="cuda")
    far = pool.as_strided(own.key.shape, (2**31 + 2 * row, *own.key.stride()[1:]))
    with torch.no_grad():
        far.copy_(own.key)
    results = []
    for key in (far.requires_grad_(), own.key):
        out = segment_attention(query, [Segment(key, own.value)], backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [query, key, own.value])])
    for name, ours, near in zip(("output", "gradient of query", "gradient of key", "gradient of value"), *results):
        assert_close(name, ours, near, 2e-3)


@gpu
def test_gpu_falls_back_to_plain_pytorch_and_merges_what_it_gives() -> None:
    """No fused kernel takes a head_dim of 20, and einsum's outputs are not contiguous."""
    query, segments = draw(3, 37, [PREFIX, WINDOW, OWN], torch.bfloat16, head_dim=20, device="cuda")
    out = segment_attention(query, segments)
    used = dispatch.used("segment_attention")
    assert used is not None and used.name == "math"
    assert_no_worse("output", out, plain(query, segments), dense(*in_double(query, segments)), slack=1e-3)


@gpu
@pytest.mark.parametrize("backend", ["auto", *FUSED])
def test_gpu_graph_capture(backend: str) -> None:
    """Forward and backward replayed from a CUDA graph on new numbers."""
    query, segments = gpu_backend(backend)
    grad_out = torch.randn_like(query)
    named = leaves(query, segments)

    def step() -> list[Tensor]:
        out = segment_attention(query, segments, backend=backend)
        return [out, *differentiate(out, grad_out, named).values()]

    graph, outputs = captured(step, warm=2)
    with torch.no_grad():
        for tensor in named.values():
            tensor.normal_()
    graph.replay()
    for name, ours, eager in zip(["output", *named], outputs, step()):
        assert_close(name, ours, eager, 2e-3)


@gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gpu_compiles_to_one_graph(backend: str) -> None:
    query, segments = gpu_backend(backend)
    out = torch.compile(segment_attention, fullgraph=True, backend="aot_eager")(query, segments, backend=backend)
    expected = segment_attention(query, segments, backend=backend)
    assert torch.equal(out, expected)
    grad_out = torch.randn_like(query)
    ours, eager = (differentiate(result, grad_out, leaves(query, segments)) for result in (out, expected))
    for name in eager:
        assert_close(f"gradient of {name}", ours[name], eager[name], 2e-3)


@gpu
def test_gpu_auto_takes_the_best_kernel() -> None:
    query, segments = gpu_backend("auto")
    segment_attention(query, segments)
    used = dispatch.used("segment_attention")
    assert used is not None and used.name == ("cudnn" if torch.cuda.get_device_capability() >= (9, 0) else "flash")
    segment_attention(query.float(), [Segment(segment.key.float(), segment.value.float()) for segment in segments[2:]])
    assert dispatch.used("segment_attention") == ("math", "the fused kernels take float16 and bfloat16, not torch.float32")
