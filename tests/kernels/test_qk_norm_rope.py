"""q/k RMSNorm and RoPE: bit for bit the generator's arithmetic on a CPU; the kernels no worse than it against complex float64."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from arcopo_kernels import dispatch
from arcopo_kernels.qk_norm_rope import apply_rope, op, qk_norm_rope, rms_norm
from arcopo_kernels.testing import ROUNDING, assert_close, assert_no_worse
from torch import Tensor

Grid = tuple[int, int, int]

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")

# Heads, head_dim and grid: Wan's head; E no power of two and not a multiple of 8; no spatial pairs at all and a single token. E is large
# enough for a mean error of E elements to say something.
SHAPES = [(2, 128, (2, 1, 3)), (13, 10, (3, 2, 1)), (61, 2, (1, 1, 1)), (1, 204, (2, 2, 2))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# The generator's arithmetic, written apart: every rounding point of it is pinned by the official bf16 outputs.


def model_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def model_rope(x: Tensor, position: int, grid: Grid) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu" and x.dtype.itemsize < 4:
        dtype = torch.float64
    (frames, rows, columns), head_dim = grid, x.shape[-1]
    spatial = head_dim // 6
    axes = []
    for pairs, start, count in ((head_dim // 2 - 2 * spatial, position, frames), (spatial, 0, rows), (spatial, 0, columns)):
        frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs) if pairs else torch.zeros(0, dtype=torch.float64)
        axes.append(torch.outer(torch.arange(start, start + count, dtype=torch.float64), frequencies))
    time, row, column = axes
    size = (frames, rows, columns, -1)
    angles = torch.cat([time[:, None, None].expand(size), row[None, :, None].expand(size), column[None, None].expand(size)], dim=-1)
    angles = angles.reshape(frames * rows * columns, 1, head_dim // 2)
    cos, sin = angles.cos().to(x.device, dtype), angles.sin().to(x.device, dtype)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def model_norm_rope(x: Tensor, weight: Tensor, position: int, grid: Grid, eps: float) -> Tensor:
    return model_rope(model_rms_norm(x.flatten(2), weight, eps).unflatten(2, x.shape[2:]), position, grid)


def exact_norm_rope(x: Tensor, weight: Tensor | None, position: int, grid: Grid | None, eps: float) -> Tensor:
    """In complex float64, from the definition; differentiable."""
    x = x.double()
    if weight is not None:
        size = x.shape[2] * x.shape[3]
        x = x / (x.square().sum((2, 3), keepdim=True) / size + eps).sqrt() * weight.double().view(x.shape[2:])
    if grid is None:
        return x
    frames, rows, columns = grid
    head_dim = x.shape[3]
    turns = []
    for frame in range(position, position + frames):
        for row in range(rows):
            for column in range(columns):
                time = head_dim // 2 - 2 * (head_dim // 6)
                axes = ((frame, time), (row, head_dim // 6), (column, head_dim // 6))
                turns.append([at * 10000.0 ** (-index / pairs) for at, pairs in axes for index in range(pairs)])
    angles = torch.tensor(turns, dtype=torch.float64, device=x.device)[:, None]
    pairs = torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)


def draw(
    heads: int, head_dim: int, grid: Grid, dtype: torch.dtype, device: torch.device, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key and value as slices of one fused projection, and the weights of the norms, with gaps, too."""
    tokens, size = grid[0] * grid[1] * grid[2], heads * head_dim
    fused = (0.3 + 2 * torch.randn(batch, tokens, 3 * size)).to(device, dtype)
    query, key, value = (part.unflatten(2, (heads, head_dim)) for part in fused.chunk(3, dim=2))
    query_weight, key_weight = (1 + 0.3 * torch.randn(size, 2)).to(device, dtype).unbind(1)
    return query, key, value, query_weight, key_weight


def slack(dtype: torch.dtype, device: torch.device) -> float:
    """Triton's interpreter truncates where it should round to bf16: once more the error of a rounding.

    A GPU's reciprocal square root and division are right to 2 units in the last place, and their error is that of a whole row.
    """
    if device.type == "cpu":
        return ROUNDING[dtype] if dtype == torch.bfloat16 else 1e-7
    return 3e-7


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("heads, head_dim, grid", SHAPES)
def test_reference_is_the_generators_arithmetic_bit_for_bit(heads: int, head_dim: int, grid: Grid, dtype: torch.dtype) -> None:
    query, key, _, query_weight, key_weight = draw(heads, head_dim, grid, dtype, torch.device("cpu"))
    for position, key_position in ((0, 0), (7, 3), (1023, 1022), (4095, 5000)):
        expected_query = model_norm_rope(query, query_weight, position, grid, 1e-6)
        expected_key = model_norm_rope(key, key_weight, key_position, grid, 1e-6)
        at = {"grid": grid, "position": position, "key_position": key_position}
        actual = qk_norm_rope(query, key, query_weight, key_weight, **at)
        assert torch.equal(actual[0], expected_query) and torch.equal(actual[1], expected_key)
        assert torch.equal(rms_norm(query.flatten(2), query_weight), model_rms_norm(query.flatten(2), query_weight, 1e-6))
        assert torch.equal(apply_rope(query, position, grid), model_rope(query, position, grid))
        if position < 4090:
            assert torch.equal(apply_rope(query, torch.tensor(position), grid), model_rope(query, position, grid))
            with torch.inference_mode():
                assert torch.equal(apply_rope(query, position, grid), model_rope(query, position, grid))


def test_float64_against_complex_numbers() -> None:
    query, key, _, query_weight, key_weight = (t.requires_grad_() for t in draw(3, 16, (2, 3, 2), torch.float64, torch.device("cpu")))
    actual = qk_norm_rope(query, key, query_weight, key_weight, grid=(2, 3, 2), position=11, key_position=2, eps=1e-3)
    for ours, x, weight, position in ((actual[0], query, query_weight, 11), (actual[1], key, key_weight, 2)):
        expected, into = exact_norm_rope(x, weight, position, (2, 3, 2), 1e-3), torch.randn_like(ours)
        assert_close("output", ours, expected, 1e-12)
        for name, mine, theirs in zip(
            ("input", "weight"), torch.autograd.grad(ours, (x, weight), into), torch.autograd.grad(expected, (x, weight), into)
        ):
            assert_close(f"gradient of {name}", mine, theirs, 1e-12)


def outputs_and_gradients(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], into: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    into = tuple(g.to(out.dtype) for g, out in zip(into, outputs))
    return outputs, torch.autograd.grad(outputs, inputs, into)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, head_dim, grid", SHAPES)
def test_kernel_is_no_worse_than_plain_pytorch(
    heads: int, head_dim: int, grid: Grid, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcopo_kernels.qk_norm_rope.triton.WEIGHT_GRADIENT_PROGRAMS", 5)  # several tokens each, the last one fewer
    query, key, _, query_weight, key_weight = draw(heads, head_dim, grid, dtype, device)
    inputs = tuple(t.detach().requires_grad_() for t in (query, key, query_weight, key_weight))  # detach keeps the strides of slices
    into = tuple(torch.randn(t.shape).to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    position, key_position = 37, 1000
    on_device = torch.tensor([position], dtype=torch.int32, device=device)
    with dispatch.use("triton"):
        actual = qk_norm_rope(*inputs, grid=grid, position=on_device, key_position=key_position)
        ours = outputs_and_gradients(actual, inputs, into)
    assert dispatch.used("qk_norm_rope").name == "triton"
    with dispatch.use("reference"):
        plain = qk_norm_rope(*inputs, grid=grid, position=position, key_position=key_position)
        theirs = outputs_and_gradients(plain, inputs, into)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = tuple(
        exact_norm_rope(x, weight, at, grid, 1e-6) for x, weight, at in ((wide[0], wide[2], position), (wide[1], wide[3], key_position))
    )
    expected = outputs_and_gradients(exact, wide, into)
    for mine, other, true, names in zip(ours, theirs, expected, (("query", "key"), ("query", "key", "query_weight", "key_weight"))):
        for name, a, b, c in zip(names, mine, other, true):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert_no_worse(name, a, b, c, slack=slack(dtype, device))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_the_kernel(dtype: torch.dtype, device: torch.device) -> None:
    """The norm alone, over rows of any leading shape, and the rotation alone."""
    grid = (3, 1, 2)
    query, _, _, weight, _ = draw(3, 14, grid, dtype, device)
    x, weight = query.detach().requires_grad_(), weight.detach().requires_grad_()
    into = torch.randn(x.shape).to(device, dtype)
    results = {}
    for implementation in ("triton", "reference"):
        with dispatch.use(implementation):
            normed = rms_norm(x.flatten(2), weight, 1e-5).view_as(x)
            roped = apply_rope(x, 29, grid)
        norm_gradients = torch.autograd.grad(normed, (x, weight), into)
        results[implementation] = (normed, roped, *norm_gradients, *torch.autograd.grad(roped, x, into))
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    normed, roped = exact_norm_rope(wide, wide_weight, 0, None, 1e-5), exact_norm_rope(wide, None, 29, grid, 0)
    gradients = (*torch.autograd.grad(normed, (wide, wide_weight), into.double()), *torch.autograd.grad(roped, wide, into.double()))
    names = ("normed", "roped", "gradient through the norm", "gradient of the weight", "gradient through the rotation")
    for name, ours, theirs, true in zip(names, results["triton"], results["reference"], (normed, roped, *gradients)):
        assert_no_worse(name, ours, theirs, true, slack=slack(dtype, device))


@needs_triton
def test_positions_beyond_the_table(device: torch.device) -> None:
    """A host position makes the table grow; a position only the device knows gives NaN, and only in the frames that have none."""
    grid = (2, 1, 1)
    query = draw(2, 12, grid, torch.float32, device, batch=1)[0]
    with dispatch.use("triton"):
        assert_close("far", apply_rope(query, 70000, grid), exact_norm_rope(query, None, 70000, grid, 0), 1e-6)
        out = apply_rope(query, torch.tensor(4095, device=device), grid)
    assert_close("the last position", out[:, :1], exact_norm_rope(query, None, 4095, grid, 0)[:, :1], 1e-6)
    assert out[:, 1].isnan().any()


@needs_triton
def test_runs_are_bitwise_equal_and_empty_batches_pass(device: torch.device) -> None:
    grid = (2, 1, 3)
    inputs = tuple(t.detach().requires_grad_() for i, t in enumerate(draw(3, 10, grid, torch.float32, device)) if i != 2)
    into = torch.randn(2, *inputs[0].shape, device=device)
    with dispatch.use("triton"):
        first, second = (
            (*out, *torch.autograd.grad(out, inputs, tuple(into))) for out in (qk_norm_rope(*inputs, grid=grid) for _ in range(2))
        )
        empty = qk_norm_rope(inputs[0][:0], inputs[1][:0], *inputs[2:], grid=grid)
        gradients = torch.autograd.grad(empty[0].sum() + empty[1].sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert empty[0].shape == (0, 6, 3, 10) and all((g == 0).all() for g in gradients)


@needs_triton
def test_any_strides_and_one_output_alone(device: torch.device) -> None:
    """[B, H, T, D] behind the query, a key expanded over the batch, the gradient of a sum, and no gradient at all for the query."""
    grid = (2, 1, 3)
    query, key, _, query_weight, key_weight = (t.detach() for t in draw(3, 10, grid, torch.float32, device))
    query, key, weights = query.transpose(1, 2).contiguous().transpose(1, 2), key[:1], (query_weight, key_weight)
    inputs = tuple(t.requires_grad_() for t in (query, key, *weights))
    results = {}
    for implementation in ("triton", "reference"):
        with dispatch.use(implementation):
            outputs = qk_norm_rope(query, key.expand(2, -1, -1, -1), *weights, grid=grid, position=3)
        both = torch.autograd.grad(outputs[0].sum() + 3 * outputs[1].sum(), inputs, retain_graph=True)
        results[implementation] = (*outputs, *both, *torch.autograd.grad(outputs[1].square().sum(), inputs[1::2]))
    names = ("query", "key", *(f"gradient {name}" for name in ("query", "key", "query_weight", "key_weight", "key alone", "its weight")))
    for name, ours, theirs in zip(names, results["triton"], results["reference"]):
        assert_close(name, ours, theirs, 1e-5)


@needs_triton
def test_a_second_derivative_is_refused(device: torch.device) -> None:
    query, key, _, *weights = draw(2, 8, (1, 2, 1), torch.float32, device)
    query.requires_grad_()
    with dispatch.use("triton"):
        out = qk_norm_rope(query, key, *weights, grid=(1, 2, 1))[0]
        (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            gradient.sum().backward()


@pytest.mark.gpu
@needs_triton
def test_offsets_beyond_32_bits() -> None:
    """Branches 2^31 elements apart."""
    device, grid, heads, head_dim = torch.device("cuda"), (1, 2, 2), 2, 128
    fused, *weights = draw(heads, head_dim, grid, torch.bfloat16, device)[2:]
    apart = (2**31 + 1024, heads * head_dim, head_dim, 1)
    far = torch.empty(apart[0] + 4096, dtype=torch.bfloat16, device=device).as_strided((2, 4, heads, head_dim), apart)
    near = far.copy_(fused).contiguous()
    with dispatch.use("triton"):
        expected = qk_norm_rope(near, near, *weights, grid=grid)
        actual = qk_norm_rope(far, far, *weights, grid=grid)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@needs_triton
def test_frozen_weights_get_no_gradient(device: torch.device) -> None:
    query, key, _, query_weight, key_weight = draw(2, 8, (1, 2, 1), torch.float32, device)
    key.requires_grad_()
    with dispatch.use("triton"):
        sum(out.square().sum() for out in qk_norm_rope(query, key, query_weight, key_weight, grid=(1, 2, 1))).backward()
    assert key.grad is not None and query.grad is None and query_weight.grad is None and key_weight.grad is None


@needs_triton
def test_registration(device: torch.device) -> None:
    query, key, _, query_weight, key_weight = draw(3, 10, (2, 1, 2), torch.float32, device, batch=1)
    a, b, c, d = (t.detach().requires_grad_() for t in (query, key, query_weight, key_weight))
    start = torch.tensor(3, device=device)
    torch.library.opcheck(op._qk_norm_rope.registered, (a, b, c, d, start, None, 0, 5, 1, 2, 1e-6))
    torch.library.opcheck(op._qk_norm_rope.registered, (a, None, c.detach(), None, None, None, 0, 0, 0, 0, 1e-6))
    torch.library.opcheck(op._qk_norm_rope.registered, (a, None, None, None, start, None, 0, 0, 1, 2, 0.0))


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
def test_compiles_as_one_graph(implementation: str, device: torch.device) -> None:
    grid = (2, 1, 2)
    query, key, _, query_weight, key_weight = draw(3, 10, grid, torch.float32, device)
    inputs = tuple(t.detach().requires_grad_() for t in (query, key, query_weight, key_weight))

    def block(position: int | Tensor) -> tuple[Tensor, ...]:
        roped = qk_norm_rope(*inputs, grid=grid, position=position, key_position=1)
        normed = rms_norm(roped[0].flatten(2), query_weight)
        return *roped, normed, apply_rope(roped[1], position, grid)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with dispatch.use(implementation):
        for position in (3, 8, torch.tensor(4, device=device)):
            ours, theirs = compiled(position), block(position)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
            for gradients in zip(*(torch.autograd.grad(sum(t.square().sum() for t in out), inputs) for out in (ours, theirs))):
                assert_close("gradient", *gradients, 1e-6)


def test_the_table_is_a_constant_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "arcopo_kernels.qk_norm_rope.constant", raising=False)  # imported for the first time while tracing
    operations: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, grid = torch.randn(2, 12, 4, 24), (3, 2, 2)
    with dispatch.use("reference"):
        compiled = torch.compile(lambda x: apply_rope(x, 5, grid), fullgraph=True, backend=record)
        assert torch.equal(compiled(x), apply_rope(x, 5, grid))
    assert "stack" in str(operations) and not re.search(r"outer|\bpow|\bcos\b", " ".join(operations))


@pytest.mark.gpu
def test_cuda_graph_is_replayed_at_another_chunk() -> None:
    device, grid = torch.device("cuda"), (3, 4, 5)
    query, key, _, query_weight, key_weight = draw(12, 128, grid, torch.bfloat16, device)
    start = torch.tensor(0, device=device)

    def step() -> tuple[Tensor, ...]:
        return qk_norm_rope(query, key, query_weight, key_weight, grid=grid, position=start)

    with torch.no_grad():
        step()  # compiles, and makes the table
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for position in (3, 18):
            start.fill_(position)
            graph.replay()
            expected = qk_norm_rope(query, key, query_weight, key_weight, grid=grid, position=position)
            assert all(torch.equal(a, b) for a, b in zip(captured, expected))


def test_bad_arguments_are_named() -> None:
    grid = (2, 1, 2)
    query, key, _, query_weight, key_weight = draw(3, 10, grid, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"query has shape \(2, 4, 30\); expected \[B, T, H, D\]"):
        qk_norm_rope(query.flatten(2), key.flatten(2), query_weight, key_weight, grid=grid)
    with pytest.raises(ValueError, match=r"key is \(2, 4, 3, 10\) torch.float64 on cpu; expected the same as the query"):
        qk_norm_rope(query, key.double(), query_weight, key_weight, grid=grid)
    with pytest.raises(ValueError, match=r"key_weight has shape \(10,\) on cpu; expected \[30\]"):
        qk_norm_rope(query, key, query_weight, key_weight[:10], grid=grid)
    with pytest.raises(ValueError, match=r"4 tokens do not fill a grid of \(3, 1, 2\)"):
        qk_norm_rope(query, key, query_weight, key_weight, grid=(3, 1, 2))
    with pytest.raises(ValueError, match="a position is -1"):
        qk_norm_rope(query, key, query_weight, key_weight, grid=grid, position=-1)
    with pytest.raises(ValueError, match=r"a position is a tensor \(2,\) torch.int64 on cpu; expected one integer"):
        qk_norm_rope(query, key, query_weight, key_weight, grid=grid, key_position=torch.arange(2))
    with pytest.raises(ValueError, match="with an even D"):
        apply_rope(query[..., :9], 0, grid)
    with pytest.raises(ValueError, match=r"weight has shape \(10,\) on cpu; expected \[E\]"):
        rms_norm(query.flatten(2), query_weight[:10])
    with dispatch.use("triton"), pytest.raises(ValueError, match="(float64 is computed in plain PyTorch|triton is not installed)"):
        apply_rope(query.double(), 0, grid)
