"""Segment attention against PyTorch's own attention over concatenated keys, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from arcopo_kernels import Segment, segment_attention
from torch import Tensor


def concatenated(query: Tensor, segments: list[Segment]) -> Tensor:
    """The same attention through F.scaled_dot_product_attention on expanded, concatenated keys and values."""
    batch = query.shape[0]
    key, value = (torch.cat([s[i].expand(batch, *s[i].shape[1:]) for s in segments], dim=1).transpose(1, 2) for i in (0, 1))
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value).transpose(1, 2)


def draw(batch: int, queries: int, lengths: list[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, list[Segment]]:
    query = torch.randn(batch, queries, 3, 10, dtype=dtype)
    return query, [Segment(torch.randn(b, n, 3, 10, dtype=dtype), torch.randn(b, n, 3, 10, dtype=dtype)) for b, n in lengths]


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("lengths", [[7], [1, 13], [0, 5, 1, 0]])
def test_equals_concatenation(batch: int, lengths: list[int]) -> None:
    # Every other segment is shared by the batch.
    query, segments = draw(batch, 11, [(1 if i % 2 == 0 else batch, n) for i, n in enumerate(lengths)], torch.float64)
    torch.testing.assert_close(segment_attention(query, segments), concatenated(query, segments), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_attention(dtype: torch.dtype) -> None:
    query, segments = draw(4, 33, [(1, 40), (4, 17)], dtype)
    exact = concatenated(query.double(), [Segment(s.key.double(), s.value.double()) for s in segments])
    ours = (segment_attention(query, segments).double() - exact).abs().max()
    plain = (concatenated(query, segments).double() - exact).abs().max()
    assert ours <= 2 * plain + torch.finfo(dtype).eps


def test_gradients() -> None:
    query, segments = draw(3, 5, [(1, 6), (3, 4)], torch.float64)
    leaves = [query, *(t for s in segments for t in (s.key, s.value))]
    for leaf in leaves:
        leaf.requires_grad_()
    weight = torch.randn(3, 5, 3, 10, dtype=torch.float64)
    ours = torch.autograd.grad((segment_attention(query, segments) * weight).sum(), leaves)
    official = torch.autograd.grad((concatenated(query, segments) * weight).sum(), leaves)
    for a, b in zip(ours, official):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_frozen_segment_gets_no_gradient_and_changes_no_other() -> None:
    query, (first, second) = draw(2, 5, [(1, 6), (2, 4)], torch.float64)
    for leaf in (query, first.key, first.value, second.key, second.value):
        leaf.requires_grad_()
    weight = torch.randn(2, 5, 3, 10, dtype=torch.float64)
    loss = (segment_attention(query, [first._replace(frozen=True), second]) * weight).sum()
    frozen = torch.autograd.grad(loss, [first.key, first.value, query, second.key, second.value], allow_unused=True)
    whole = torch.autograd.grad((segment_attention(query, [first, second]) * weight).sum(), [query, second.key, second.value])
    assert frozen[0] is None and frozen[1] is None
    for a, b in zip(frozen[2:], whole):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bad_arguments_are_named() -> None:
    query, segments = draw(2, 5, [(3, 6)], torch.float32)
    with pytest.raises(ValueError, match=r"segment 0: key has shape \(3, 6, 3, 10\); expected \[1 or 2, Tk, 3, 10\]"):
        segment_attention(query, segments)
    with pytest.raises(ValueError, match="no key at all"):
        segment_attention(query, [])
    with pytest.raises(ValueError, match="float64"):
        segment_attention(query, [Segment(torch.randn(1, 2, 3, 10).double(), torch.randn(1, 2, 3, 10).double())])
