"""copy_pages: what a write to a shared page costs, all layers' keys and values in one launch.

Traffic: each page that is copied from is read once, each page that is copied to is written. Forks, windows and reads move nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from arcopo_kernels.paging import copy_pages

from benchmarks import shapes
from benchmarks.measure import Bench


class Shape(NamedTuple):
    model: shapes.Model
    shared: int
    copies: int


CASES = shapes.cases(
    gpu=[
        Shape(shapes.WAN_1_3B, 1, shapes.GROUP),  # every branch of a group writes to the frame they share
        Shape(shapes.WAN_1_3B, 3, 1),  # one video writes to a chunk that another one holds
        Shape(shapes.WAN_14B, 3, 1),
    ],
    cpu=[Shape(shapes.SMALL, 2, 3)],
)


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: f"{shape.model.name}-{shape.shared}x{shape.copies}")
def test_copy_pages(bench: Bench, shape: Shape) -> None:
    model, shared, copies = shape
    pages = shared * (1 + copies)
    size = (model.layers, pages, model.frame, model.heads, model.head_dim)
    keys, values = (torch.randn(size, device=shapes.DEVICE, dtype=shapes.ACTIVATIONS) for _ in range(2))
    sources = torch.arange(shared, device=shapes.DEVICE).repeat(copies)
    targets = torch.arange(shared, pages, device=shapes.DEVICE)
    bench(
        "copy_pages",
        f"{model.name} {shared} shared page{'s' if shared > 1 else ''}, {copies} cop{'ies' if copies > 1 else 'y'} of each",
        lambda: copy_pages(keys, values, sources, targets),
        traffic=2 * keys.nbytes,
    )
