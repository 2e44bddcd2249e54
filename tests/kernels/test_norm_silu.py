"""RMSNorm with SiLU: the reference is the VAE's arithmetic, the kernel no worse than it against float64, and only `out` is written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from arcopo_kernels import dispatch
from arcopo_kernels.norm_silu import norm_silu, op
from arcopo_kernels.testing import ROUNDING, assert_close, assert_no_worse
from torch import Tensor

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")

# 96 channels are the fewest of Wan2.1's decoder; 43 pixels of them are more than one program holds, and no multiple of what one does.
SHAPES = [(2, 43, 1, 96), (3, 2, 5, 3, 7), (1, 5, 1030), (2, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    x = (0.5 + 2 * torch.randn(shape)).to(device, dtype)
    x.view(-1, shape[-1])[torch.randint(x[..., 0].numel(), ())] = 0  # a pixel without a direction
    return x, (1 + 0.3 * torch.randn(shape[-1])).to(device, dtype)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """In float64 from the definition."""
    x, size = x.double(), x.shape[-1]
    y = x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) * size**0.5 * weight.double()
    return y / (1 + (-y).exp())


def diffusers(x: Tensor, weight: Tensor) -> Tensor:
    """As diffusers' WanRMS_norm and SiLU compute it at x's precision."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.silu(F.normalize(wide, dim=-1).to(x.dtype) * x.shape[-1] ** 0.5 * weight)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_no_worse_than_diffusers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(shape, dtype, torch.device("cpu"))
    with dispatch.use("reference"):
        y = norm_silu(x, weight)
    true = exact(x, weight)
    assert_close("y", y, true, 3 * ROUNDING[dtype])
    if x[0].numel() > 100:
        assert_no_worse("y", y, diffusers(x, weight), true, slack=1e-15)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_no_worse_than_plain_pytorch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight = draw(shape, dtype, device)
    with dispatch.use("reference"):
        theirs = norm_silu(x, weight)
    with dispatch.use("triton"):
        ours = norm_silu(x, weight)
    assert ours.dtype == dtype and ours.isfinite().all()
    # Triton's interpreter truncates where it should round to bf16, twice the error; a tensor of few elements says little about a mean one.
    slack = 2 * ROUNDING[dtype] if device.type == "cpu" or x.numel() < 1000 else 1e-7
    assert_no_worse("y", ours, theirs, exact(x, weight), slack=slack)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
def test_writes_the_end_of_a_buffer_and_nothing_else(implementation: str, device: torch.device) -> None:
    x, weight = draw((2, 3, 5, 4, 24), torch.float32, device)
    buffer = torch.randn(2, 5, 5, 4, 24, device=device)
    front, given = buffer[:, :2].clone(), x.clone()
    with dispatch.use(implementation):
        returned = norm_silu(x, weight, out=buffer[:, 2:])
        alone = norm_silu(x, weight)
    used = dispatch.used("norm_silu")
    assert returned.data_ptr() == buffer[:, 2:].data_ptr() and used is not None and used.name == implementation
    assert torch.equal(buffer[:, 2:], alone) and torch.equal(buffer[:, :2], front) and torch.equal(x, given)
    assert_close("y", alone, exact(x, weight), 1e-6)


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(4)
    for arguments, message in (
        ((x.transpose(0, 1), weight), "contiguous"),
        ((torch.randn(4), weight), r"\[B, .., C\]"),
        ((x, torch.randn(3)), r"weight is \(3,\)"),
        ((x, weight.double()), "weight is"),
        ((x, weight, torch.randn(2, 3, 5)), "out is"),
        ((x, weight, torch.randn(2, 4, 3).transpose(1, 2)), r"each out\[b\]"),
        ((x, weight, torch.randn(1, 3, 4).expand(2, 3, 4)), "overlap"),
        ((x, weight.requires_grad_()), "no_grad"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_silu(*arguments)


@needs_triton
def test_registration(device: torch.device) -> None:
    x, weight = draw((2, 3, 12), torch.float32, device)
    torch.library.opcheck(op._norm_silu.registered, (x, weight, torch.empty_like(x)))
    torch.library.opcheck(op._norm_silu.registered, (x, weight, torch.randn(2, 5, 12, device=device)[:, 2:]))
    with pytest.raises(RuntimeError, match="slice it outside"):  # what compiled code could hand to the kernel
        op._norm_silu(x, weight, x[:, :0])


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
def test_compile_without_graph_breaks(implementation: str, device: torch.device) -> None:
    x, weight = draw((2, 3, 5, 12), torch.float32, device)
    start = torch.randn(2, 5, 5, 12, device=device)

    def step(window: Tensor) -> tuple[Tensor, Tensor]:
        norm_silu(x, weight, out=window[:, 2:])
        return window * 2, norm_silu(x, weight)

    with dispatch.use(implementation):
        torch._dynamo.reset()
        windows = [start.clone(), start.clone()]
        results = [f(window) for f, window in zip((step, torch.compile(step, fullgraph=True, backend="aot_eager")), windows)]
    for name, eager, compiled in zip(("window", "doubled", "y"), (windows[0], *results[0]), (windows[1], *results[1])):
        assert_close(name, compiled, eager, 1e-6)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
def test_extreme_inputs(implementation: str, device: torch.device) -> None:
    """Nothing to write; a weight with a stride; and a pixel with a NaN or an infinity in it harms no other one."""
    x, weight = draw((2, 3, 12), torch.float32, device)
    with dispatch.use(implementation):
        for shape in ((0, 3, 12), (2, 0, 12), (2, 3, 0)):
            assert norm_silu(x.new_empty(shape), weight[: shape[-1]]).shape == shape
        clean = norm_silu(x, weight)
        assert torch.equal(norm_silu(x, weight.repeat_interleave(2)[::2]), clean)
        x[0, 1, 4], x[1, 2, 7] = float("nan"), float("inf")
        y = norm_silu(x, weight)
    assert y[0, 1].isnan().all() and y[1, 2, 7].isnan() and (y[1, 2].nan_to_num() == 0).all()
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(y.flatten(0, 1)[others], clean.flatten(0, 1)[others])


@pytest.mark.gpu
@needs_triton
def test_offsets_beyond_32_bits() -> None:
    """2^31 elements and a few pixels more in one batch item: the last are what they are alone, up to one rounding to bfloat16."""
    x = torch.randn(1, 1, 128, dtype=torch.bfloat16, device="cuda") * torch.randn(1, 2**24 + 3, 1, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(128, dtype=torch.bfloat16, device="cuda")
    with dispatch.use("triton"):
        torch.testing.assert_close(norm_silu(x, weight)[:, -5:], norm_silu(x[:, -5:].contiguous(), weight), rtol=2**-7, atol=1e-3)
