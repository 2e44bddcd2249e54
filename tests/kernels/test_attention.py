"""Segment attention against dense attention over concatenated keys in float64, written here: outputs, every gradient, every backend.

The budget of a precision is twice the error of PyTorch's own attention at that precision over expanded, concatenated keys.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from arcopo_kernels import Segment, dispatch, segment_attention
from arcopo_kernels.attention import backends, merge_attention, op
from arcopo_kernels.testing import ROUNDING, assert_close
from support.attention import OWN, PREFIX, WINDOW, Run, check, dense, differentiate, draw, leaves
from torch import Tensor

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")


CPU_CASES = [
    *itertools.product(["math", "cpu"], [torch.float32, torch.bfloat16]),
    *(pytest.param("triton", dtype, marks=needs_triton) for dtype in (torch.float32, torch.float16)),
]


@pytest.fixture
def interpreted() -> None:
    if not dispatch.INTERPRETED:
        pytest.skip("Triton compiles in this process: there is a GPU")


@pytest.mark.parametrize(("backend", "dtype"), CPU_CASES)
@pytest.mark.parametrize(
    ("batch", "queries", "runs"),
    [
        pytest.param(3, 37, [PREFIX, OWN], id="prefix and own"),
        pytest.param(1, 33, [Run(70, True, False)], id="one branch, one segment"),
        pytest.param(2, 5, [PREFIX, Run(0, False, False), WINDOW, OWN], id="three segments and an empty one"),
        pytest.param(5, 11, [Run(1, True, True), Run(1, False, False)], id="one-token segments"),
        pytest.param(64, 3, [PREFIX, Run(2, False, False)], id="64 branches"),
        # Several branches: the rounding of one log-sum-exp goes into all of its query's gradients.
        pytest.param(16, 1, [PREFIX, OWN], id="one query"),
    ],
)
def test_error_is_at_most_twice_that_of_plain_attention(
    backend: str, dtype: torch.dtype, batch: int, queries: int, runs: list[Run], request: pytest.FixtureRequest
) -> None:
    if backend == "triton":
        request.getfixturevalue("interpreted")
    check(backend, *draw(batch, queries, runs, dtype, heads=1 if batch == 64 else 2))


@needs_triton
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_triton_takes_every_head_dim_and_whole_and_partial_tiles(head_dim: int, interpreted: None) -> None:
    check("triton", *draw(2, 130, [Run(64, True, False), Run(65, False, False)], torch.float16, heads=1, head_dim=head_dim))


@pytest.mark.parametrize("backend", ["math", "cpu"])
def test_in_double_the_segments_are_the_whole(backend: str) -> None:
    """The operator's own path: per segment, merged, and the backward from the global output and log-sum-exp."""
    query, segments = draw(3, 11, [PREFIX, WINDOW, OWN, Run(1, False, False)], head_dim=10)
    keys, values = [segment.key for segment in segments], [segment.value for segment in segments]
    out, lse = torch.ops.arcopo.segment_attention(query, keys, values, [segment.frozen for segment in segments], 10**-0.5, backend)
    expected = dense(query, segments)
    assert_close("output", out, expected, 1e-14)
    scores = torch.cat([torch.einsum("bqhd,bkhd->bhqk", query, key.expand(3, -1, -1, -1)) for key in keys], dim=-1)
    assert_close("log-sum-exp", lse, (scores * 10**-0.5).logsumexp(-1), 1e-14)
    assert not lse.requires_grad
    grad_out = torch.randn_like(out)
    ours = differentiate(out, grad_out, leaves(query, segments))
    exact = differentiate(expected, grad_out, leaves(query, segments))
    for name in exact:
        assert_close(f"gradient of {name}", ours[name], exact[name], 1e-13)


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("lengths", [[7], [1, 13], [0, 5, 1, 0]])
def test_default_on_a_cpu_in_double(batch: int, lengths: list[int]) -> None:
    query, segments = draw(batch, 11, [Run(keys, index % 2 == 0, False) for index, keys in enumerate(lengths)], head_dim=10)
    torch.testing.assert_close(segment_attention(query, segments), dense(query, segments), rtol=0, atol=1e-13)
    assert dispatch.used("segment_attention") == ("cpu", "the first choice")
    torch.testing.assert_close(segment_attention(query, segments, scale=0.7), dense(query * 0.7 * 10**0.5, segments), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["math", "cpu", pytest.param("triton", marks=needs_triton)])
def test_a_frozen_segment_gets_no_gradient_and_changes_no_other(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "triton":
        request.getfixturevalue("interpreted")
    query, (first, second) = draw(2, 5, [WINDOW, OWN], torch.float32)
    grad_out = torch.randn_like(query)
    tensors = [query, second.key, second.value, first.key, first.value]
    frozen_out = segment_attention(query, [first._replace(frozen=True), second], backend=backend)
    frozen = torch.autograd.grad(frozen_out, tensors, grad_out, allow_unused=True)
    whole = torch.autograd.grad(segment_attention(query, [first, second], backend=backend), tensors, grad_out)
    assert frozen[3] is None and frozen[4] is None
    for a, b in zip(frozen[:3], whole):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_strided_views_are_read_in_place(backend: str, request: pytest.FixtureRequest) -> None:
    """Keys and values as a page pool hands them out, with gaps between the branches, and a query that is not contiguous."""
    if backend == "triton":
        request.getfixturevalue("interpreted")
    pool = torch.randn(2, 6, 20, 2, 32)
    prefix = Segment(pool[0, 1, :13].unsqueeze(0), pool[1, 1, :13].unsqueeze(0), True)
    own = Segment(pool[0, 2:5, 3:11], pool[1, 2:5, 3:11])
    query = torch.randn(3, 2, 7, 32).transpose(1, 2)
    assert not own.key.is_contiguous() and not query.is_contiguous()
    out = segment_attention(query, [prefix, own], backend=backend)
    assert_close("output", out, dense(query.double(), [Segment(s.key.double(), s.value.double()) for s in (prefix, own)]), 1e-6)


@pytest.mark.parametrize("backend", ["math", "cpu", pytest.param("triton", marks=needs_triton)])
def test_expanded_keys_and_gradients(backend: str, request: pytest.FixtureRequest) -> None:
    """Strides of 0: keys expanded over the branches, values over the heads, too, and the gradient of a sum."""
    if backend == "triton":
        request.getfixturevalue("interpreted")
    inputs = query, key, value = [torch.randn(*shape, 16, requires_grad=True) for shape in ((3, 5, 2), (1, 7, 2), (1, 7, 1))]
    segments = [Segment(key.expand(3, -1, -1, -1), value.expand(3, -1, 2, -1))]
    out, expected = segment_attention(query, segments, backend=backend), dense(query, segments)
    assert_close("output", out, expected, 1e-6)
    for name, ours, exact in zip(("query", "key", "value"), *(torch.autograd.grad(x.sum(), inputs) for x in (out, expected))):
        assert_close(f"gradient of {name}", ours, exact, 1e-5)


def test_what_is_computed_again_is_what_autocast_left_alone() -> None:
    query, segments = draw(2, 5, [PREFIX, OWN], torch.float32)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, lse = op._forward(query, [s.key for s in segments], [s.value for s in segments], [True, False], 0.2, "math")
        results.append([out, lse, *torch.autograd.grad(out.square().sum(), [query, segments[1].key, segments[1].value])])
    for ours, expected in zip(*results):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", ["math", "cpu", pytest.param("triton", marks=needs_triton)])
def test_a_second_derivative_is_refused(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "triton":
        request.getfixturevalue("interpreted")
    query, segments = draw(1, 3, [Run(4, False, False)], torch.float32, heads=1, head_dim=16)
    out, _ = op._forward(query, [segments[0].key], [segments[0].value], [False], 0.25, backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_pytorch_takes_the_arguments_of_its_gpu_operators(backend: str) -> None:
    """On the meta device nothing is computed, but names, order, types and shapes are PyTorch's."""
    with torch.device("meta"):
        query, grad_out = torch.randn(2, 2, 5, 3, 16, dtype=torch.bfloat16).unbind()
        key, value = torch.randn(2, 2, 7, 3, 16, dtype=torch.bfloat16).unbind()
    out, lse = backends.BACKENDS[backend].forward(query, key, value, 0.25)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, (2, 3, 5), torch.float32)
    grads = backends.BACKENDS[backend].backward(grad_out, query, key, value, out, lse, 0.25, True)
    assert [gradient.shape for gradient in grads if gradient is not None] == [query.shape, key.shape, value.shape]


@needs_triton
def test_triton_is_bitwise_repeatable(device: torch.device) -> None:
    query, segments = draw(2, 70, [PREFIX, OWN], torch.float16, heads=1, device=device)
    grad_out = torch.randn_like(query)
    results = []
    for _ in range(2):
        out = segment_attention(query, segments, backend="triton")
        results.append([out, *differentiate(out, grad_out, leaves(query, segments)).values()])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merge_is_attention_over_the_union(parts: int) -> None:
    query, segments = draw(2, 5, [OWN] * parts)
    both = [backends.BACKENDS["math"].forward(query, segment.key, segment.value, query.shape[-1] ** -0.5) for segment in segments]
    out, lse = merge_attention([out for out, _ in both], [lse for _, lse in both])
    expected = dense(query, segments)
    assert_close("output", out, expected, 1e-14)
    assert lse.shape == (2, 2, 5)
    grad_out = torch.randn_like(out)
    ours, exact = (differentiate(result, grad_out, leaves(query, segments)) for result in (out, expected))
    for name in exact:
        assert_close(f"gradient of {name}", ours[name], exact[name], 1e-13)


def test_merge_where_queries_see_no_key() -> None:
    outs, lses = torch.randn(2, 1, 3, 1, 4), torch.randn(2, 1, 1, 3)
    lses[0, ..., 0] = lses[:, ..., 1] = -torch.inf
    out, lse = merge_attention(list(outs), list(lses))
    torch.testing.assert_close(out[0, 0], outs[1, 0, 0])
    assert not out[0, 1].any() and lse[0, 0, 1] == -torch.inf and out.isfinite().all()
    with pytest.raises(ValueError, match="2 outputs and 1 log-sum-exps"):
        merge_attention(list(outs), list(lses[:1]))


@pytest.mark.parametrize("parts", range(2, 5))
def test_merge_pair_by_pair(parts: int) -> None:
    outs = [torch.randn(3, 5, 2, 40) for _ in range(parts)]
    lses = [30 * torch.randn(3, 2, 5) for _ in range(parts)]  # of some queries one set of keys outweighs all others
    out, lse = backends.merge_pairwise(outs, lses)
    expected, expected_lse = merge_attention([out.double() for out in outs], [lse.double() for lse in lses])
    assert_close("output", out, expected, 1e-6)
    assert_close("log-sum-exp", lse, expected_lse, 1e-6)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", range(2, 8))
def test_triton_merge(device: torch.device, dtype: torch.dtype, parts: int) -> None:
    from arcopo_kernels.attention import triton

    outs = [torch.randn(3, 5, 2, 40, dtype=dtype, device=device) for _ in range(parts)]
    outs[1] = outs[1].transpose(1, 2).contiguous().transpose(1, 2)  # as einsum leaves it
    lses = [10 * torch.randn(3, 2, 5, device=device) for _ in range(parts)]
    lses[0] = lses[0].transpose(0, 1).contiguous().transpose(0, 1)  # as of a folded segment
    lses[1] = lses[1].transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = triton.merge(outs, lses)
    expected, expected_lse = merge_attention([out.double() for out in outs], [lse.double() for lse in lses])
    assert out.dtype == dtype
    truncates = dtype == torch.bfloat16 and dispatch.INTERPRETED  # where hardware rounds to nearest
    assert_close("output", out, expected, ROUNDING[dtype] * (2 if truncates else 1))
    assert_close("log-sum-exp", lse, expected_lse, 1e-6)


@pytest.mark.parametrize("backend", ["math", "cpu", pytest.param("triton", marks=needs_triton)])
def test_operator_is_registered_rightly(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "triton":
        request.getfixturevalue("interpreted")
    query, segments = draw(2, 3, [Run(5, True, True), Run(4, False, False)], torch.float32, heads=1, head_dim=16)
    keys, values = [segment.key for segment in segments], [segment.value for segment in segments]
    frozen = [segment.frozen for segment in segments]
    torch.library.opcheck(op._forward.registered, (query, keys, values, frozen, 0.25, backend))
    keys, values = ([tensor.detach() for tensor in tensors] for tensors in (keys, values))
    query = query.detach()
    out, lse = op._forward(query, keys, values, frozen, 0.25, backend)
    grad_out = torch.randn_like(out)
    torch.library.opcheck(op._backward.registered, (grad_out, query, keys, values, out, lse, [False, True], 0.25, backend))


@pytest.mark.parametrize("backend", ["auto", "cpu", pytest.param("triton", marks=needs_triton)])
def test_compiles_to_one_graph(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "triton":
        request.getfixturevalue("interpreted")
    query, segments = draw(2, 3, [PREFIX, OWN], torch.float32)

    def attend(query: Tensor, segments: list[Segment]) -> Tensor:
        return 2 * segment_attention(2 * query, segments, backend=backend)

    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(query, segments)
    expected = attend(query, segments)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grad_out = torch.randn_like(out)
    ours, eager = (differentiate(result, grad_out, leaves(query, segments)) for result in (out, expected))
    for name in eager:
        assert_close(f"gradient of {name}", ours[name], eager[name], 1e-6)


def test_bad_arguments_are_named() -> None:
    query, segments = draw(2, 5, [Run(6, False, False)], torch.float32, heads=3, head_dim=10)
    wrong = Segment(torch.randn(3, 6, 3, 10), torch.randn(3, 6, 3, 10))
    with pytest.raises(ValueError, match=r"segment 1: key has shape \(3, 6, 3, 10\); expected \[1 or 2, Tk, 3, 10\]"):
        segment_attention(query, [*segments, wrong])
    with pytest.raises(ValueError, match=r"segment 0: value has shape \(2, 5, 3, 10\)"):
        segment_attention(query, [segments[0]._replace(value=torch.randn(2, 5, 3, 10))])
    with pytest.raises(ValueError, match="no key at all"):
        segment_attention(query, [])
    with pytest.raises(ValueError, match="no key at all"):
        segment_attention(query, [Segment(torch.randn(1, 0, 3, 10), torch.randn(1, 0, 3, 10))])
    with pytest.raises(ValueError, match="float64"):
        segment_attention(query, [Segment(torch.randn(1, 2, 3, 10).double(), torch.randn(1, 2, 3, 10).double())])
    with pytest.raises(ValueError, match="backend is 'fast'; expected one of auto, math, cpu"):
        segment_attention(query, segments, backend="fast")


@pytest.mark.parametrize("backend", ["cudnn", "flash", "fa3", "fa4"])
def test_a_backend_that_cannot_take_the_call_says_why(backend: str) -> None:
    query, segments = draw(2, 5, [OWN], torch.bfloat16)
    with pytest.raises(ValueError, match=f"'{backend}' was asked for, but the tensors are on cpu; use 'auto'"):
        segment_attention(query, segments, backend=backend)


@needs_triton
def test_triton_says_what_it_cannot_take(interpreted: None) -> None:
    query, segments = draw(2, 5, [OWN], torch.bfloat16)
    with pytest.raises(ValueError, match="'triton' was asked for, but Triton's interpreter computes bfloat16"):
        segment_attention(query, segments, backend="triton")
    with pytest.raises(ValueError, match="head_dim of 16, 32, 64, 128, not 24"):
        segment_attention(*draw(2, 5, [OWN], torch.float16, head_dim=24), backend="triton")


def test_what_was_asked_for_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument before the environment before `use`."""
    query, segments = draw(2, 5, [OWN], torch.float32)

    def ran_on(backend: str = "auto") -> str:
        segment_attention(query, segments, backend=backend)
        used = dispatch.used("segment_attention")
        assert used is not None
        return used.name

    with dispatch.use("reference"):
        assert ran_on() == "math"
        monkeypatch.setattr(op, "_forced", "cpu")
        assert ran_on() == "cpu"
        assert ran_on("math") == "math"
    with pytest.raises(ValueError, match="ARCOPO_ATTENTION is 'fast'"):
        dispatch.checked("fast", "ARCOPO_ATTENTION", op.NAMES)
