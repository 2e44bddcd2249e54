"""LayerNorm, modulation, gated residual: bit for bit the generator's arithmetic on a CPU; the kernels no worse than it against float64."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from arcopo_kernels import dispatch
from arcopo_kernels.modulation import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate, op
from arcopo_kernels.testing import ROUNDING, assert_close, assert_no_worse
from torch import Tensor, nn

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")

# batch, frames, tokens, E; then how many batches and frames the modulation has. 17 tokens are more than one partial sum takes, and E is
# large enough for a mean error of E elements to say something.
SHAPES = [((2, 2, 3, 133), (1, 2)), ((1, 1, 17, 200), (1, 1)), ((1, 1, 1, 1030), (1, 1)), ((2, 2, 1, 99), (2, 1)), ((2, 2, 2, 84), (2, 2))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "y", "gate", "scale", "shift", "weight", "bias")


def draw(shape: tuple[int, ...], modulated: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Arguments by name; the modulations are slices of one tensor, as a generator has them, and nothing has to be contiguous."""
    size = shape[-1]
    x, y = (0.5 + 2 * torch.randn(2, *shape)).to(device, dtype)
    gate, scale, shift = (0.5 * torch.randn(*modulated, 3, size)).to(device, dtype).unsqueeze(3).unbind(2)
    weight, bias = (torch.tensor([1.0, 0.0]) + 0.3 * torch.randn(size, 2)).to(device, dtype).unbind(1)
    return dict(zip(NAMES, (x, y, gate, scale, shift, weight, bias)))


def slack(dtype: torch.dtype, device: torch.device) -> float:
    """Triton's interpreter truncates where it should round to bf16: once more the error of a rounding.

    A GPU's reciprocal square root and division are right to 2 units in the last place, and their error is that of a whole row.
    """
    if device.type == "cpu":
        return ROUNDING[dtype] if dtype == torch.bfloat16 else 1e-7
    return 3e-7


Arguments = dict[str, Tensor]


def norm(a: Arguments) -> tuple[Tensor, ...]:
    return (layer_norm_modulate(a["x"], scale=a["scale"], shift=a["shift"]),)


def norm_affine(a: Arguments) -> tuple[Tensor, ...]:
    return (layer_norm_modulate(a["x"], weight=a["weight"], bias=a["bias"], eps=1e-5),)


def residual(a: Arguments) -> tuple[Tensor, ...]:
    return (gated_residual(a["x"], a["y"], a["gate"]),)


def residual_norm(a: Arguments) -> tuple[Tensor, ...]:
    return gated_residual_layer_norm_modulate(a["x"], a["y"], a["gate"], scale=a["scale"], shift=a["shift"])


def residual_norm_affine(a: Arguments) -> tuple[Tensor, ...]:
    return gated_residual_layer_norm_modulate(a["x"], a["y"], a["gate"], weight=a["weight"], bias=a["bias"])


def ungated_residual_norm(a: Arguments) -> tuple[Tensor, ...]:
    return gated_residual_layer_norm_modulate(a["x"], a["y"], scale=a["scale"], shift=a["shift"])


def everything(a: Arguments) -> tuple[Tensor, ...]:
    return gated_residual_layer_norm_modulate(**a)


Case = tuple[Callable[[Arguments], tuple[Tensor, ...]], str, float]
CASES: list[Case] = [
    (norm, "x scale shift", 1e-6),
    (norm_affine, "x weight bias", 1e-5),
    (residual, "x y gate", 0.0),
    (residual_norm, "x y gate scale shift", 1e-6),
    (residual_norm_affine, "x y gate weight bias", 1e-6),
    (ungated_residual_norm, "x y scale shift", 1e-6),
    (everything, " ".join(NAMES), 1e-6),
]


def exact(a: Arguments, names: str, eps: float) -> tuple[Tensor, ...]:
    """In float64 from the definition; differentiable."""
    given = {name: a[name].double() for name in names.split()}
    hidden = given["x"]
    outputs = []
    if "y" in given:
        hidden = hidden + given["y"] * given.get("gate", torch.ones((), dtype=torch.float64, device=hidden.device))
        outputs.append(hidden)
    if eps:
        centred = hidden - hidden.sum(-1, keepdim=True) / hidden.shape[-1]
        out = centred / (centred.square().sum(-1, keepdim=True) / hidden.shape[-1] + eps).sqrt()
        if "weight" in given:
            out = out * given["weight"] + given["bias"]
        if "scale" in given:
            out = out + out * given["scale"] + given["shift"]
        outputs.append(out)
    return tuple(outputs)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape, modulated", SHAPES)
def test_reference_is_the_generators_arithmetic_bit_for_bit(shape: tuple[int, ...], modulated: tuple[int, ...], dtype: torch.dtype) -> None:
    a = draw(shape, modulated, dtype, torch.device("cpu"))
    x, y, gate, scale, shift, weight, bias = a.values()
    plain = nn.LayerNorm(shape[-1], eps=1e-6, elementwise_affine=False)
    affine = nn.LayerNorm(shape[-1], eps=1e-6).to(dtype)
    affine.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(layer_norm_modulate(x, scale=scale, shift=shift), plain(x) * (1 + scale) + shift)
    assert torch.equal(layer_norm_modulate(x, weight=weight, bias=bias), affine(x))
    assert torch.equal(gated_residual(x, y, gate), x + y * gate)
    assert torch.equal(gated_residual(x, y), x + y)
    hidden, out = gated_residual_layer_norm_modulate(x, y, gate, scale=scale, shift=shift)
    assert torch.equal(hidden, x + y * gate) and torch.equal(out, plain(hidden) * (1 + scale) + shift)
    hidden, out = gated_residual_layer_norm_modulate(x, y, weight=weight, bias=bias)
    assert torch.equal(hidden, x + y) and torch.equal(out, affine(hidden))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_float64_against_the_definition(case: Case) -> None:
    call, names, eps = case
    a = {name: t.detach().requires_grad_() for name, t in draw((2, 3, 2, 20), (2, 1), torch.float64, torch.device("cpu")).items()}
    inputs = [a[name] for name in names.split()]
    ours, true = call(a), exact(a, names, eps)
    into = [torch.randn_like(t) for t in ours]
    for mine, theirs in zip(ours, true):
        assert_close("output", mine, theirs, 1e-12)
    for name, mine, theirs in zip(names.split(), torch.autograd.grad(ours, inputs, into), torch.autograd.grad(true, inputs, into)):
        assert_close(f"gradient of {name}", mine, theirs, 1e-12)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case, shape, modulated",
    [(case, *SHAPES[0]) for case in CASES] + [(CASES[-1], *shape) for shape in SHAPES[1:]],
    ids=[case[0].__name__ for case in CASES] + [f"everything-{shape}" for shape, _ in SHAPES[1:]],
)
def test_kernel_is_no_worse_than_plain_pytorch(
    case: Case, shape: tuple[int, ...], modulated: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    call, names, eps = case
    a = {name: t.detach().requires_grad_() for name, t in draw(shape, modulated, dtype, device).items()}
    inputs = [a[name] for name in names.split()]
    with dispatch.use("triton"):
        ours = call(a)
    with dispatch.use("reference"):
        theirs = call(a)
    true = exact(a, names, eps)
    into = [torch.randn(t.shape).to(device, dtype) for t in ours]
    for mine, other, right in zip(ours, theirs, true):
        assert mine.dtype == other.dtype
        assert_no_worse("output", mine, other, right, slack=slack(dtype, device))
    wide = {name: t.detach().double().requires_grad_() for name, t in a.items()}
    expected = torch.autograd.grad(exact(wide, names, eps), [wide[name] for name in names.split()], [g.double() for g in into])
    gradients = zip(names.split(), torch.autograd.grad(ours, inputs, into), torch.autograd.grad(theirs, inputs, into), expected)
    for name, mine, other, right in gradients:
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert_no_worse(f"gradient of {name}", mine, other, right, slack=slack(dtype, device))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_its_two_halves_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    a = draw((2, 2, 3, 33), (2, 2), dtype, device)
    a["x"] = a["x"].transpose(1, 2).contiguous().transpose(1, 2)  # any strides
    keep = {name: a[name] for name in ("scale", "shift", "weight", "bias")}
    with dispatch.use("triton"):
        hidden, out = everything(a)
        alone = gated_residual(a["x"], a["y"], a["gate"])
        assert torch.equal(hidden, alone) and torch.equal(out, layer_norm_modulate(alone, **keep))
    for name in ("gated_residual", "layer_norm_modulate", "gated_residual_layer_norm_modulate"):
        assert dispatch.used(name).name == "triton"


@needs_triton
def test_mixed_dtypes_promote_as_in_pytorch(device: torch.device) -> None:
    """bf16 activations, fp32 modulation: diffusers keeps it so."""
    a = draw((2, 2, 3, 9), (1, 2), torch.float32, device)
    a = {name: (t.bfloat16() if name in ("x", "y") else t).detach().requires_grad_() for name, t in a.items()}
    inputs = [a[name] for name in ("x", "y", "gate", "scale", "shift")]
    results = []
    for implementation in ("triton", "reference"):
        with dispatch.use(implementation):
            outputs = residual_norm(a)
        results.append((*outputs, *torch.autograd.grad(sum(out.sum() + out.square().sum() for out in outputs), inputs)))
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        assert_close("mixed", ours, theirs, 1e-2)


@needs_triton
def test_runs_are_bitwise_equal_and_empty_batches_pass(device: torch.device) -> None:
    a = {name: t.detach().requires_grad_() for name, t in draw((1, 1, 19, 12), (1, 1), torch.float32, device).items()}
    into = torch.randn(2, 1, 1, 19, 12, device=device)
    with dispatch.use("triton"):
        first, second = ((*out, *torch.autograd.grad(out, list(a.values()), tuple(into))) for out in (everything(a) for _ in range(2)))
        empty = everything({**a, "x": a["x"][:0], "y": a["y"][:0]})
        gradients = torch.autograd.grad(empty[0].sum() + empty[1].sum(), list(a.values()))
    assert all(torch.equal(p, q) for p, q in zip(first, second))
    assert empty[1].shape == (0, 1, 19, 12) and all((g == 0).all() for g in gradients)


@needs_triton
def test_one_output_alone_can_carry_gradient(device: torch.device) -> None:
    a = {name: t.detach().requires_grad_() for name, t in draw((1, 2, 2, 12), (1, 2), torch.float32, device).items()}
    for index in range(2):
        with dispatch.use("triton"):
            ours = torch.autograd.grad(everything(a)[index].square().sum(), [a["x"], a["y"], a["gate"]])
        with dispatch.use("reference"):
            theirs = torch.autograd.grad(everything(a)[index].square().sum(), [a["x"], a["y"], a["gate"]])
        for name, mine, other in zip(("x", "y", "gate"), ours, theirs):
            assert_close(name, mine, other, 1e-5)


@needs_triton
def test_expanded_arguments_and_gradients(device: torch.device) -> None:
    """Strides of 0: one frame for all, one modulation for all, and the gradient of a sum."""
    a = {name: t.detach().requires_grad_() for name, t in draw((2, 1, 3, 20), (1, 1), torch.float32, device).items()}
    modulations = {name: a[name].expand(2, 3, 1, 20) for name in ("gate", "scale", "shift")}
    results = []
    for implementation in ("triton", "reference"):
        with dispatch.use(implementation):
            outputs = gated_residual_layer_norm_modulate(a["x"].expand(2, 3, 3, 20), a["y"].expand(2, 3, 3, 20), **modulations)
        inputs = [a[name] for name in ("x", "y", *modulations)]
        results.append((*outputs, *torch.autograd.grad(outputs[0].sum() + 3 * outputs[1].sum(), inputs)))
    for name, ours, theirs in zip(("hidden", "out", "x", "y", *modulations), *results):
        assert_close(name, ours, theirs, 1e-5)


@needs_triton
def test_a_second_derivative_is_refused(device: torch.device) -> None:
    a = draw((1, 2, 2, 12), (1, 2), torch.float32, device)
    x = a["x"].detach().requires_grad_()
    with dispatch.use("triton"):
        (gradient,) = torch.autograd.grad(norm({**a, "x": x})[0].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            gradient.sum().backward()


@pytest.mark.gpu
@needs_triton
def test_more_frames_than_a_grid_has_rows() -> None:
    """A modulation for each of 70,000 tokens: the frame of every token is its own."""
    a = {name: t.detach().requires_grad_() for name, t in draw((2, 35000, 1, 24), (2, 35000), torch.float32, torch.device("cuda")).items()}
    results = []
    for implementation in ("triton", "reference"):
        with dispatch.use(implementation):
            outputs = everything(a)
        results.append((*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), list(a.values()))))
    for name, ours, theirs in zip(("hidden", "out", *NAMES), *results):
        assert_close(name, ours, theirs, 1e-4)


@pytest.mark.gpu
@needs_triton
def test_offsets_beyond_32_bits() -> None:
    """2^31 elements and a few tokens more: the last of them are what they are alone, up to one rounding to bfloat16."""
    a = draw((1, 1, 2**20 + 3, 1), (1, 1), torch.bfloat16, torch.device("cuda"))
    x = torch.randn(1, 1, 1, 2048, dtype=torch.bfloat16, device="cuda") * a["x"]
    gate, scale, shift = torch.randn(3, 1, 1, 1, 2048, dtype=torch.bfloat16, device="cuda")
    last = x[:, :, -5:]
    with dispatch.use("triton"):
        far = gated_residual_layer_norm_modulate(x, x, gate, scale=scale, shift=shift)
        near = gated_residual_layer_norm_modulate(last, last, gate, scale=scale, shift=shift)
    for mine, other in zip(far, near):
        torch.testing.assert_close(mine[:, :, -5:], other, rtol=2**-7, atol=1e-3)


@needs_triton
def test_registration(device: torch.device) -> None:
    a = {name: t.detach().requires_grad_() for name, t in draw((1, 2, 1, 12), (1, 2), torch.float32, device).items()}
    x, y, gate, scale, shift, weight, bias = a.values()
    torch.library.opcheck(op._modulation.registered, (x, None, None, scale, shift, None, None, 1e-6, True))
    torch.library.opcheck(op._modulation.registered, (x, y, gate.detach(), None, None, None, None, 0.0, False))
    torch.library.opcheck(op._modulation.registered, (x, y, gate, scale, shift, weight, bias, 1e-6, True))


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
def test_compiles_as_one_graph(implementation: str, device: torch.device) -> None:
    a = {name: t.detach().requires_grad_() for name, t in draw((2, 2, 3, 12), (1, 2), torch.float32, device).items()}

    def block(a: Arguments) -> tuple[Tensor, ...]:
        hidden, out = residual_norm_affine({**a, "x": norm(a)[0]})
        return hidden, out, gated_residual(hidden, out, a["gate"])

    with dispatch.use(implementation):
        ours, theirs = torch.compile(block, fullgraph=True, backend="aot_eager")(a), block(a)
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs))
        for gradients in zip(*(torch.autograd.grad(sum(t.square().sum() for t in out), list(a.values())) for out in (ours, theirs))):
            assert_close("gradient", *gradients, 1e-6)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    a = draw((2, 3, 40, 1536), (1, 3), torch.bfloat16, torch.device("cuda"))
    everything(a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(a)
    for name, t in draw((2, 3, 40, 1536), (1, 3), torch.bfloat16, torch.device("cuda")).items():
        a[name].copy_(t)
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, everything(a)))


def test_bad_arguments_are_named() -> None:
    a = draw((2, 3, 4, 10), (2, 3), torch.float32, torch.device("cpu"))
    x, y, gate, scale, _, weight, _ = a.values()
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 10\); expected \[B, F, T, E\]"):
        layer_norm_modulate(x[0])
    with pytest.raises(ValueError, match=r"y has shape \(2, 3, 3, 10\) on cpu; expected that of x, \(2, 3, 4, 10\)"):
        gated_residual(x, y[:, :, :3])
    with pytest.raises(ValueError, match=r"gate has shape \(2, 3, 10\) on cpu; expected \[1 or 2, 1 or 3, 1, 10\]"):
        gated_residual(x, y, gate[:, :, 0])
    with pytest.raises(ValueError, match=r"scale has shape \(2, 2, 1, 10\)"):
        gated_residual_layer_norm_modulate(x, y, gate, scale=scale[:, :2])
    with pytest.raises(ValueError, match=r"weight has shape \(9,\) on cpu; expected \[10\]"):
        layer_norm_modulate(x, weight=weight[:9])
    with dispatch.use("triton"), pytest.raises(ValueError, match="(float64 is computed in plain PyTorch|triton is not installed)"):
        gated_residual(x.double(), y.double())
