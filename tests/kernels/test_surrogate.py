"""The surrogate against its definition in float64: two full distance softmaxes, their ratio, min and clip, through autograd."""

from __future__ import annotations

from typing import Iterator, NamedTuple

import pytest
import torch
from arcopo_kernels import dispatch
from arcopo_kernels.surrogate import copo_surrogate
from arcopo_kernels.surrogate import op as surrogate_op
from arcopo_kernels.testing import ROUNDING, assert_close
from support.graphs import assert_compiles_whole, assert_replays_other_inputs
from torch import Tensor

CLIP = 1e-4
IMPLEMENTATIONS = ["reference", "triton"]

if dispatch.TRITON_INSTALLED:
    import triton
    import triton.language as tl
    from arcopo_kernels.surrogate import triton as surrogate_triton
    from arcopo_kernels.surrogate.triton import _expm1, _log1p

    @triton.jit
    def _apply(x_ptr, expm1_ptr, log1p_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, SIZE)
        x = tl.load(x_ptr + offsets)
        tl.store(expm1_ptr + offsets, _expm1(x))
        tl.store(log1p_ptr + offsets, _log1p(tl.maximum(x, -0.75)))


@pytest.fixture
def kernels(device: torch.device) -> Iterator[torch.device]:
    """The device of a test of the Triton kernels."""
    pytest.importorskip("triton")
    with dispatch.use("triton"):
        yield device


class Inputs(NamedTuple):
    pred: Tensor
    old: Tensor
    candidates: Tensor
    advantages: Tensor
    step_index: Tensor

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(tensor.to(device) for tensor in self))


def draw(
    anchors: int,
    steps: int,
    group: int,
    shape: tuple[int, ...],
    update: float | Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float64,) * 3,
) -> Inputs:
    """Candidates half a standard deviation around common latents; anchors close to one of them; `update` is the rms of pred - old."""
    candidates = torch.randn(steps, 1, *shape) + 0.5 * torch.randn(steps, group, *shape)
    step_index = torch.randint(steps, (anchors,))
    old = candidates[step_index, torch.randint(group, (anchors,))] + 0.01 * torch.randn(anchors, *shape)
    update = torch.as_tensor(update).reshape(-1, *[1] * len(shape))
    pred = old + update * torch.randn(anchors, *shape)
    advantages = torch.randn(group, dtype=torch.float64)
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    return Inputs(pred.to(dtypes[0]), old.to(dtypes[1]), candidates.to(dtypes[2]), advantages, step_index)


class Definition(NamedTuple):
    distance: Tensor
    log_prob: Tensor
    log_ratio: Tensor
    loss: Tensor


def definition(inputs: Inputs, tau: float, clip: float | None, mean: bool) -> Definition:
    """Each [N, G] or [N], from squared distances in float64."""
    reduce = torch.mean if mean else torch.sum
    rows = []
    for pred, old, step in zip(inputs.pred.double(), inputs.old.double(), inputs.step_index):
        candidates = inputs.candidates[step].double().flatten(1)
        distance, old_distance = (reduce((candidates - x.flatten()) ** 2, dim=1) for x in (pred, old))
        log_prob, old_log_prob = torch.log_softmax(-distance / tau, 0), torch.log_softmax(-old_distance / tau, 0)
        rho = (log_prob - old_log_prob).exp()
        bounded = rho if clip is None else rho.clamp(1 - clip, 1 + clip)
        loss = -torch.minimum(rho * inputs.advantages, bounded * inputs.advantages).mean()
        rows.append(Definition(distance, log_prob, log_prob - old_log_prob, loss))
    return Definition(*(torch.stack(parts) for parts in zip(*rows)))


def gradient_of(value: Tensor, weight: Tensor, pred: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad((value * weight).sum(), pred, retain_graph=True)
    return gradient


@pytest.mark.parametrize("clip", [None, 1e-2, 1e-4])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("update", [1e-3, 1e-1])
def test_reference(clip: float | None, mean: bool, update: float) -> None:
    inputs = draw(5, 3, 12, (3, 7, 5), update)
    tau = 0.7 if mean else 70.0
    pred, weight = inputs.pred.requires_grad_(), torch.randn(5, dtype=torch.float64)
    out = copo_surrogate(*inputs, tau=tau, clip=clip, reduction="mean" if mean else "sum")
    expected = definition(inputs, tau, clip, mean)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.ratio_minus_one, expected.log_ratio.detach().exp() - 1, rtol=0, atol=1e-13)
    assert_close("gradient", gradient_of(out.loss, weight, pred), gradient_of(expected.loss, weight, pred), 1e-11)
    if clip == 1e-4 and update == 1e-1:
        assert not out.live.all() and out.live.any(), "this case must exercise the clip"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("anchors", "steps", "group", "shape", "dtypes"),
    [
        (5, 3, 12, (3, 7, 5), (F32, F32, F32)),
        (5, 3, 12, (3, 7, 5), (BF16, F32, F32)),
        (3, 1, 7, (5003,), (F16, BF16, F32)),  # several tiles, the last one short
        (1, 1, 2, (1,), (F32, F32, F32)),
        (2, 1, 64, (33,), (F32, F32, BF16)),
        (64, 4, 3, (17,), (F32, F32, F32)),
        (2, 3, 1, (9,), (F32, F32, F32)),
    ],
)
@pytest.mark.parametrize("mean", [True, False])
def test_kernels(
    kernels: torch.device,
    anchors: int,
    steps: int,
    group: int,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    mean: bool,
) -> None:
    inputs = draw(anchors, steps, group, shape, 0.1, dtypes)
    if group == 1:
        inputs = inputs._replace(advantages=torch.randn(1, dtype=torch.float64))
    inputs, weight = inputs.to(kernels), torch.randn(anchors, dtype=torch.float64, device=kernels)
    tau, clip = (0.7 if mean else 0.7 * inputs.pred[0].numel()), 1e-2
    pred = inputs.pred.requires_grad_()
    out = copo_surrogate(*inputs, tau=tau, clip=clip, reduction="mean" if mean else "sum")
    expected = definition(inputs, tau, clip, mean)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.ratio_minus_one, torch.expm1(expected.log_ratio), rtol=0, atol=1e-13)
    tolerance = 1e-6 if pred.dtype == F32 else ROUNDING[pred.dtype]
    actual = gradient_of(out.loss, weight, pred)
    assert actual.dtype == pred.dtype
    if group > 1:
        assert_close("gradient", actual, gradient_of(expected.loss, weight, pred), tolerance)
    else:
        assert (actual.abs() <= 1e-15).all()


@pytest.mark.parametrize("size", [299_520, 299_519])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernels_at_full_size(kernels: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int) -> None:
    """A chunk of Wan's latents, updates of 1e-4 to 1e-2 rms: log-ratios to a millionth of the clip radius, and every clip decision."""
    if kernels.type == "cpu":  # the interpreter's time goes with the number of programs
        monkeypatch.setattr(surrogate_triton, "block_sizes", lambda *_: surrogate_triton.BlockSizes(2, 32768, 8, 1))
    inputs = draw(2, 1, 12, (size,), torch.tensor([1e-4, 1e-2]), (dtype, dtype, dtype)).to(kernels)
    pred, weight = inputs.pred.requires_grad_(), torch.ones(2, dtype=torch.float64, device=kernels)
    for tau in (1.0, 1 / 30):
        out = copo_surrogate(*inputs, tau=tau, clip=CLIP)
        expected = definition(inputs, tau, CLIP, mean=True)
        error = (torch.log1p(out.ratio_minus_one) - expected.log_ratio).abs().amax(1)
        assert (error <= 1e-6 * CLIP).all(), f"tau {tau:.3g}: log-ratio off by {error.tolist()}"
        ratio = torch.expm1(expected.log_ratio)
        clipped = ((inputs.advantages > 0) & (ratio > CLIP)) | ((inputs.advantages < 0) & (ratio < -CLIP))
        assert (out.live == ~clipped).all()
        actual, exact = gradient_of(out.loss, weight, pred), gradient_of(expected.loss, weight, pred)
        for n in range(2):
            assert_close(f"gradient of anchor {n}, tau {tau:.3g}", actual[n], exact[n], 1e-6 if dtype == F32 else ROUNDING[BF16])
    assert clipped.any() and out.live.any(), "the last case must exercise the clip"


def test_other_forms_miss_the_criterion() -> None:
    """A millionth of the clip radius, at tau 1/30 and an update of 1e-2 rms: by factors of about 3e4, 5e6 and 1e7 to 1e9 (see with -s)."""
    inputs = draw(1, 1, 12, (299_520,), 1e-2, (F32, F32, F32))
    tau = 1 / 30
    (exact,) = definition(inputs, tau, CLIP, mean=True).log_ratio

    def log_ratio(distances: list[Tensor]) -> Tensor:
        log_prob, old_log_prob = (torch.log_softmax(-distance / tau, 0) for distance in distances)
        return log_prob - old_log_prob

    candidates, anchors = inputs.candidates[0], (inputs.pred[0], inputs.old[0])
    forms = {
        "float32 distances, two softmaxes": log_ratio([(candidates - x).square().mean(1) for x in anchors]),
        "Gram, float32": log_ratio([(x @ x - 2 * candidates @ x + candidates.square().sum(1)) / x.numel() for x in anchors]),
        "all bfloat16": log_ratio([(candidates.bfloat16() - x.bfloat16()).square().mean(1) for x in anchors]),
    }
    missed = {name: ((form.double() - exact).abs().max() / (1e-6 * CLIP)).item() for name, form in forms.items()}
    for name, times in missed.items():
        print(f"{name}: {times:.3g} times the allowed error of the log-ratio")
    assert missed["float32 distances, two softmaxes"] > 1e3
    assert missed["Gram, float32"] > 1e4
    assert missed["all bfloat16"] > 1e6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_before_the_first_update_the_ratio_is_exactly_one(device: torch.device, implementation: str, dtype: torch.dtype) -> None:
    """And the ascent direction is (2 / (tau G)) sum_i A_i x_i at every anchor, whatever tau and the anchor."""
    if implementation == "triton":
        pytest.importorskip("triton")
    group, tau = 12, 0.3
    inputs = draw(4, 2, group, (301,), 0.0, (dtype, dtype, dtype)).to(device)
    pred = inputs.old.clone().requires_grad_()
    with dispatch.use(implementation):
        out = copo_surrogate(pred, *inputs[1:], tau=tau, reduction="sum")
    assert (out.ratio_minus_one == 0).all() and out.live.all()
    torch.testing.assert_close(out.loss, -inputs.advantages.mean().expand(4), rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(out.loss.sum(), pred)
    ascent = 2 / (tau * group) * torch.einsum("g,ngd->nd", inputs.advantages, inputs.candidates.double()[inputs.step_index])
    assert_close("ascent direction", -gradient, ascent, ROUNDING[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("update", "tau"), [(1.0, 2.0), (30.0, 0.3)])
def test_large_update(device: torch.device, implementation: str, update: float, tau: float) -> None:
    """Exponents a above 1, and above 709, where exp(a) overflows while the ratios stay finite."""
    if implementation == "triton":
        pytest.importorskip("triton")
    while True:
        inputs = draw(4, 1, 5, (40,), update, (F32, F32, F32)).to(device)
        pred, weight = inputs.pred.requires_grad_(), torch.randn(4, dtype=torch.float64, device=device)
        expected = definition(inputs, tau, CLIP, mean=False)
        large = expected.log_ratio.min() < (-1 if update == 1 else -710)
        if large and expected.loss.abs().max() < 1e30:  # a ratio against a negative advantage has no bound, and the gradient is float32
            break
    with dispatch.use(implementation):
        out = copo_surrogate(*inputs, tau=tau, clip=CLIP, reduction="sum")
    torch.testing.assert_close(out.ratio_minus_one, torch.expm1(expected.log_ratio), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-8, atol=1e-12)
    gradient = gradient_of(out.loss, weight, pred)
    if update == 1:
        assert_close("gradient", gradient, gradient_of(expected.loss, weight, pred), 1e-6)
    else:  # the policy is one-hot on another candidate: what gradient is left is rounding
        assert gradient.isfinite().all()


def test_expm1_and_log1p_of_the_kernel(kernels: torch.device) -> None:
    """Relative errors of a few roundings over the whole range, down to the smallest arguments."""
    x = torch.randn(4096, dtype=torch.float64, device=kernels) * 10 ** (20 * torch.rand(4096, dtype=torch.float64, device=kernels) - 18)
    x[:8] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.999, -0.999, 700.0, -800.0])
    expm1, log1p = torch.empty_like(x), torch.empty_like(x)
    _apply[(1,)](x, expm1, log1p, SIZE=4096)
    torch.testing.assert_close(expm1, torch.expm1(x), rtol=1e-15, atol=0)
    torch.testing.assert_close(log1p, torch.log1p(x.clamp(min=-0.75)), rtol=1e-15, atol=0)
    assert expm1[0] == 0 and log1p[0] == 0


def test_two_calls_are_bitwise_equal_and_layout_does_not_matter(kernels: torch.device) -> None:
    inputs = draw(6, 2, 12, (5, 7, 130), 0.05, (F32, F32, F32)).to(kernels)
    strided = Inputs(
        *(tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in inputs[:3]),
        torch.stack([inputs.advantages] * 2, 1)[:, 0],
        torch.stack([inputs.step_index] * 2, 1)[:, 1].int(),
    )
    assert not any(tensor.is_contiguous() for tensor in strided[:4])
    results = []
    for given in (inputs, inputs, strided):
        pred = given.pred.detach().requires_grad_()
        out = copo_surrogate(pred, *given[1:], tau=0.1)
        results.append([*out, *torch.autograd.grad(out.loss.sum(), pred)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_step_index(kernels: torch.device) -> None:
    """None means step 0; an index out of range makes that anchor NaN and no other, and reads nothing outside the candidates."""
    inputs = draw(4, 3, 5, (50,), 0.05, (F32, F32, F32)).to(kernels)
    zero = copo_surrogate(*inputs._replace(step_index=torch.zeros_like(inputs.step_index)))
    none = copo_surrogate(*inputs[:4])
    assert torch.equal(none.ratio_minus_one, zero.ratio_minus_one) and torch.equal(none.loss, zero.loss)
    wrong = torch.tensor([1, 3, -1, 2], device=kernels)
    out = copo_surrogate(*inputs._replace(step_index=wrong))
    assert out.loss.isnan().tolist() == [False, True, True, False]
    right = copo_surrogate(*inputs._replace(step_index=wrong.clamp(0, 2)))
    assert torch.equal(out.loss[[0, 3]], right.loss[[0, 3]])


def test_only_pred_gets_a_gradient_and_only_when_asked(kernels: torch.device) -> None:
    inputs = draw(2, 1, 4, (30,), 0.05, (F32, F32, F32)).to(kernels)
    out = copo_surrogate(*inputs)
    assert not out.loss.requires_grad
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:4]]
    out = copo_surrogate(*leaves, inputs.step_index)
    assert out.loss.requires_grad and not out.ratio_minus_one.requires_grad
    out.loss.sum().backward()
    assert leaves[0].grad is not None and all(leaf.grad is None for leaf in leaves[1:])
    with torch.no_grad():
        assert torch.equal(copo_surrogate(*leaves, inputs.step_index).loss, out.loss.detach())


def test_operators_pass_opcheck(kernels: torch.device) -> None:
    inputs = draw(3, 2, 4, (30,), 0.05, (F32, F32, F32)).to(kernels)
    pred = inputs.pred.detach().requires_grad_()
    for step_index in (inputs.step_index, None):
        torch.library.opcheck(surrogate_op._copo_surrogate.registered, (pred, *inputs[1:4], step_index, 1.0, CLIP, True))
    torch.library.opcheck(surrogate_op._copo_surrogate.registered, (*inputs, 1.0, None, False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(device: torch.device, implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    inputs = draw(3, 2, 4, (30,), 0.05, (F32, F32, F32)).to(device)

    def step(pred: Tensor) -> tuple[Tensor, Tensor]:
        out = copo_surrogate(pred, *inputs[1:], tau=0.1)
        return out.loss.sum(), out.ratio_minus_one

    with dispatch.use(implementation):
        assert_compiles_whole(step, inputs.pred, "ratio")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_cuda_graph(kernels: torch.device) -> None:
    """Captured once, forward and backward, and replayed with other inputs, step indices included."""
    static = draw(8, 4, 12, (5003,), 0.05, (F32, F32, F32)).to(kernels)
    static = static._replace(pred=static.pred.requires_grad_())

    def step() -> tuple[Tensor, Tensor]:
        out = copo_surrogate(*static, tau=0.1)
        return out.loss, torch.autograd.grad(out.loss.sum(), static.pred)[0]

    assert_replays_other_inputs(step, static, draw(8, 4, 12, (5003,), 0.05, (F32, F32, F32)).to(kernels))


def test_what_the_kernels_cannot_take_falls_back(kernels: torch.device) -> None:
    large = draw(1, 1, 65, (6,), 0.1, (F32, F32, F32)).to(kernels)
    double = draw(1, 1, 4, (6,), 0.1).to(kernels)
    for inputs, reason in ((large, "65 candidates, more than 64"), (double, "pred is torch.float64")):
        with pytest.raises(ValueError, match=reason):
            copo_surrogate(*inputs)
        with dispatch.use("auto"):
            copo_surrogate(*inputs)
        used = dispatch.used("copo_surrogate")
        assert used is not None and used.name == "reference" and reason in used.reason


def test_bad_arguments_are_named() -> None:
    inputs = draw(2, 1, 4, (6,), 0.1)
    pred, old, candidates, advantages, step_index = inputs
    with pytest.raises(ValueError, match=r"advantages have shape \(3,\); expected \[4\]"):
        copo_surrogate(pred, old, candidates, advantages[:3], step_index)
    with pytest.raises(ValueError, match=r"expected \[T, G, 6\]"):
        copo_surrogate(pred, old, candidates[0], advantages, step_index)
    with pytest.raises(ValueError, match=r"pred has shape \(6,\); expected \[N, ...\]"):
        copo_surrogate(pred[0], old[0], candidates[0], advantages)
    with pytest.raises(ValueError, match=r"step_index has shape \(2,\) and type torch.float64; expected \[2\] integers"):
        copo_surrogate(pred, old, candidates, advantages, step_index.double())
    with pytest.raises(ValueError, match="tau is 0"):
        copo_surrogate(*inputs, tau=0)
    with pytest.raises(ValueError, match="clip is -1"):
        copo_surrogate(*inputs, clip=-1)
    with pytest.raises(ValueError, match="reduction is 'none'"):
        copo_surrogate(*inputs, reduction="none")  # type: ignore[arg-type]
