"""Measures of error for tests and benchmarks of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""RMS error over RMS that one rounding to the dtype, and a sum over a few thousand terms in a wider one, stays below."""


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return RMS of the error over RMS of the expected values: one number without a scale. Zero tensors agree; NaN and infinity never
    do."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error, size = (actual - expected).square().mean().sqrt(), expected.square().mean().sqrt()
    if not error.isfinite():
        return float("inf")
    return float(error / size) if size > 0 else float("inf") if error > 0 else 0.0


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail, naming the tensor, unless `error_ratio` is at most `tolerance`."""
    ratio = error_ratio(actual, expected)
    assert ratio <= tolerance, f"{name}: error ratio {ratio:.3g}, allowed {tolerance:.3g}"


def assert_no_worse(name: str, actual: Tensor, same_precision: Tensor, exact: Tensor, *, factor: float = 2.0, slack: float = 1e-7) -> None:
    """Fail unless the error against `exact` is at most `factor` times that of plain PyTorch at the same precision (plus `slack`)."""
    ratio, plain = error_ratio(actual, exact), error_ratio(same_precision, exact)
    assert ratio <= factor * plain + slack, f"{name}: error ratio {ratio:.3g}; plain PyTorch at this precision has {plain:.3g}"
