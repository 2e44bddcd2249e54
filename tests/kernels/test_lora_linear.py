"""Linear layers with LoRA: the reference is the formula, its gradients those of autograd, and the kernel is no worse than plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from arcopo_kernels import dispatch
from arcopo_kernels.lora_linear import lora_linear, lora_linears, op
from arcopo_kernels.testing import ROUNDING, assert_close, assert_no_worse
from torch import Tensor

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")
BOTH = ["reference", pytest.param("triton", marks=needs_triton)]

# Layers, shape of x, outputs, rank. 67 tokens and 131 outputs are more than one tile of the kernel, and no multiple of one; ranks from 1 to
# the largest.
SHAPES = [(1, (67, 33), 131, 1), (3, (2, 9, 24), 40, 5), (2, (5, 96), 7, 64), (1, (3, 20), 9, 100), (1, (2, 12), 10, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 1.75
SOURCES = ("x", "down", "up")


def draw(layers: int, shape: tuple[int, ...], size: int, rank: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `lora_linears`; adapters are float32 masters, the second layer has no bias."""
    inputs = shape[-1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    down, up = torch.randn(layers, rank, inputs) / inputs**0.5, 0.5 * torch.randn(layers, size, rank) / rank**0.5
    return {
        "x": torch.randn(shape).to(device, dtype).requires_grad_(),
        "weights": [(torch.randn(size, inputs) / inputs**0.5).to(device, dtype) for _ in range(layers)],
        "biases": [None if index == 1 else torch.randn(size).to(device, dtype) for index in range(layers)],
        "down": down.to(device, wide).requires_grad_(),
        "up": up.to(device, wide).requires_grad_(),
    }


def double(tensor: Tensor | None, *, through: torch.dtype = torch.float64) -> Tensor | None:
    """In float64, with a gradient if it has one; rounded to `through` before."""
    return None if tensor is None else tensor.detach().to(through).double().requires_grad_(tensor.requires_grad)


def exact(a: dict[str, Any], gelu: bool) -> tuple[list[Tensor], list[Tensor]]:
    """In float64 from the definition, with adapters as they are after the cast to x's dtype; and what to differentiate with respect to."""
    dtype = a["x"].dtype
    x, down, up = (double(a[name], through=dtype) for name in SOURCES)
    outputs = []
    for index, (weight, bias) in enumerate(zip(a["weights"], a["biases"])):
        out = x @ (double(weight) + SCALE * up[index] @ down[index]).T
        out = out if bias is None else out + double(bias)
        outputs.append(out * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (out + 0.044715 * out**3))) / 2 if gelu else out)
    return outputs, [x, down, up]


def plain(a: dict[str, Any], gelu: bool) -> list[Tensor]:
    """Compute it as plain PyTorch does at x's precision, each operation rounded."""
    x, down, up = a["x"], a["down"].to(a["x"].dtype), a["up"].to(a["x"].dtype)
    layers = zip(a["weights"], a["biases"], down, up)
    outputs = [F.linear(x, weight, bias) + F.linear(F.linear(x, of_a), of_b) * SCALE for weight, bias, of_a, of_b in layers]
    return [F.gelu(out, approximate="tanh") for out in outputs] if gelu else outputs


def ours(a: dict[str, Any], gelu: bool) -> list[Tensor]:
    if len(a["weights"]) > 1:
        return lora_linears(**a, scale=SCALE, gelu=gelu)
    return [lora_linear(a["x"], a["weights"][0], a["biases"][0], a["down"][0], a["up"][0], SCALE, gelu=gelu)]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_float64_against_the_definition(case: tuple[Any, ...], gelu: bool) -> None:
    a = draw(*case, torch.float64, "cpu")
    (true, leaves), outputs = exact(a, gelu), ours(a, gelu)
    into = [torch.randn_like(out) for out in outputs]
    for mine, theirs in zip(outputs, true):
        assert_close("output", mine, theirs, 1e-12)
    gradients = torch.autograd.grad(outputs, [a[name] for name in SOURCES], into)
    for name, mine, theirs in zip(SOURCES, gradients, torch.autograd.grad(true, leaves, into)):
        assert_close(f"gradient of {name}", mine, theirs, 1e-12)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, gelu", [*itertools.product(SHAPES[:2], (False, True)), *((case, True) for case in SHAPES[2:])], ids=str)
def test_no_worse_than_plain_pytorch(
    case: tuple[Any, ...], gelu: bool, dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and implementation == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    a = draw(*case, dtype, device)
    with dispatch.use(implementation):
        outputs = ours(a, gelu)
    other, (true, leaves) = plain(a, gelu), exact(a, gelu)
    into = [torch.randn(out.shape).to(out) for out in outputs]
    name = "lora_linears" if len(outputs) > 1 else "lora_linear"
    assert dispatch.used(name).name == implementation
    slack = 0.0 if dtype == torch.float32 else 0.25 * ROUNDING[dtype]  # tensors of a hundred elements say little about a mean error
    for mine, theirs, right in zip(outputs, other, true):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert_no_worse("output", mine, theirs, right, slack=slack + 1e-7)
    gradients = (torch.autograd.grad(of, [a[name] for name in SOURCES], into) for of in (outputs, other))
    expected = torch.autograd.grad(true, leaves, [grad.double() for grad in into])
    for name, mine, theirs, right in zip(SOURCES, *gradients, expected):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert_no_worse(f"gradient of {name}", mine, theirs, right, slack=slack + 1e-7)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_must_be_the_same_bits_is(implementation: str, dtype: torch.dtype, device: torch.device) -> None:
    """With and without gradient; GELU apart; run for run; and adapters of zeros add exactly nothing."""
    a = draw(*SHAPES[1], dtype, device)
    with dispatch.use(implementation):
        for gelu in (False, True):
            recorded = ours(a, gelu)
            with torch.no_grad():
                rolled, again = ours(a, gelu), ours(a, gelu)
            assert all(torch.equal(p, q) and torch.equal(q, r) for p, q, r in zip(recorded, rolled, again))
        with torch.no_grad():
            zero = {**a, "up": torch.zeros_like(a["up"])}
            base = [F.linear(a["x"], weight, bias) for weight, bias in zip(a["weights"], a["biases"])]
            assert all(torch.equal(p, q) for p, q in zip(ours(zero, False), base))
        alone = [lora_linear(a["x"], a["weights"][i], a["biases"][i], a["down"][i], a["up"][i], SCALE) for i in range(3)]
        for together, separate in zip(ours(a, False), alone):
            assert_close("shared", together, separate, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("implementation", BOTH)
def test_what_needs_no_gradient_gets_none(implementation: str, device: torch.device) -> None:
    """A constant input; one of several outputs unused; adapters that are no masters keep their dtype."""
    a = draw(*SHAPES[1], torch.float16, device)
    a["x"] = a["x"].detach()
    a["down"] = a["down"].detach().half().requires_grad_()
    results = []
    for call in (lambda: ours(a, True), lambda: plain(a, True)):
        with dispatch.use(implementation):
            _, used, _ = call()
            results.append(torch.autograd.grad(used.float().square().sum(), [a["down"], a["up"]]))
    for mine, theirs in zip(*results):
        assert mine.dtype == theirs.dtype
        assert_close("gradient", mine, theirs, 4 * ROUNDING[torch.float16])


@pytest.mark.parametrize("implementation", BOTH)
def test_strides_and_empty_batches(implementation: str, device: torch.device) -> None:
    a = draw(*SHAPES[1], torch.float32, device)
    x = torch.randn(9, 2, 24, device=device).transpose(0, 1)
    with dispatch.use(implementation):
        for of in (x, a["x"][:0], torch.randn(2, 9, 48, device=device)[..., ::2], torch.randn(24, device=device)):
            of = of.detach().requires_grad_()
            b = {**a, "x": of}
            outputs = ours(b, True)
            for mine, theirs in zip(outputs, plain(b, True)):
                assert mine.shape == theirs.shape
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
            gradients = torch.autograd.grad([out.sum() for out in outputs], [of, a["down"], a["up"]])  # a sum's gradient has strides of 0
            expected = torch.autograd.grad([out.sum() for out in plain(b, True)], [of, a["down"], a["up"]])
            for mine, theirs in zip(gradients, expected):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, down, up = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3), torch.randn(2, 4), torch.randn(3, 2)
    for arguments, message in (
        ((x, weight, bias, down, torch.randn(3, 1)), "same r"),
        ((x, weight, bias, down[:0], up[:, :0]), "at least 1"),
        ((x, weight.T, bias, down, up), r"weight has shape \(4, 3\)"),
        ((x, weight, torch.randn(4), down, up), "bias has shape"),
        ((x, weight.half(), bias, down, up), "weight is torch.float16"),
        ((torch.randn(2, 3), weight, bias, down, up), "x has shape"),
        ((x, weight, bias, down.to("meta"), up), "one device"),
        ((x, weight, bias.clone().requires_grad_(), down, up), "freeze"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linear(*arguments)
    for arguments in (
        (x, [weight], [bias], down, up),
        (x, [weight] * 2, [bias] * 2, down[None], up[None]),
        (x, [], [], down[:0, None], up),
    ):
        with pytest.raises(ValueError, match="expected L of each"):
            lora_linears(*arguments)


def test_a_second_derivative_is_refused() -> None:
    a = draw(*SHAPES[1], torch.float32, "cpu")
    (gradient,) = torch.autograd.grad(ours(a, True)[0].square().sum(), a["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_triton
def test_ranks_beyond_the_kernels_are_plain_pytorch() -> None:
    a = draw(1, (2, 4), 3, op.LARGEST_RANK + 1, torch.float32, "cpu")
    ours(a, False)
    used = dispatch.used("lora_linear")
    assert used is not None and used.name == "reference" and "257" in used.reason
    with dispatch.use("triton"), pytest.raises(ValueError, match="257"):
        ours(a, False)


@needs_triton
def test_registration(device: torch.device) -> None:
    base, reduced, up = torch.randn(2, 7, 9, device=device), torch.randn(7, 6, device=device), torch.randn(2, 9, 3, device=device)
    torch.library.opcheck(op._lora_add.registered, (base, reduced, up, 0.5, False, None))
    torch.library.opcheck(op._lora_add.registered, (base, reduced, up, 0.5, True, torch.empty_like(base)))


@pytest.mark.parametrize("implementation", BOTH)
def test_compiles_as_one_graph(implementation: str, device: torch.device) -> None:
    a = draw(*SHAPES[1], torch.float32, device)

    def block(x: Tensor) -> tuple[Tensor, ...]:
        query, key, _ = lora_linears(**{**a, "x": x}, scale=SCALE)
        hidden = lora_linear(query + key, torch.eye(40, device=device), None, a["up"][0].T, a["up"][1], SCALE, gelu=True)
        return query, hidden

    with dispatch.use(implementation):
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        results = []
        for function in (block, compiled):
            outputs = function(a["x"])
            gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), [a[name] for name in SOURCES])
            with torch.no_grad():
                results.append((*outputs, *gradients, *function(a["x"])))
    for eager, other in zip(*results):
        assert torch.equal(eager, other)


@pytest.mark.gpu
@needs_triton
def test_graph_capture() -> None:
    """A captured call reads new inputs and new adapters from where they lie."""
    device = torch.device("cuda")
    a = {name: of.detach() if isinstance(of, Tensor) else of for name, of in draw(*SHAPES[1], torch.bfloat16, device).items()}
    with dispatch.use("triton"), torch.no_grad():
        ours(a, True)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ours(a, True)
        a["x"].normal_()
        a["up"].normal_()
        graph.replay()
        assert all(torch.equal(p, q) for p, q in zip(captured, ours(a, True)))


@pytest.mark.gpu
@needs_triton
def test_offsets_beyond_32_bits() -> None:
    """2^31 elements and a few rows more: the last are what they are alone, up to one rounding to bfloat16."""
    x = torch.randn(2**20 + 3, 16, dtype=torch.bfloat16, device="cuda")
    weight, down, up = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2048, 16), (8, 16), (2048, 8)))
    with dispatch.use("triton"), torch.no_grad():
        far, near = (lora_linear(rows, weight, None, down, up, gelu=True) for rows in (x, x[-5:]))
    torch.testing.assert_close(far[-5:], near, rtol=2**-6, atol=2e-2)
