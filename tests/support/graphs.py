"""Compiled steps and CUDA graphs, held to the same steps without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from arcopo_kernels.testing import assert_close
from torch import Tensor


def assert_compiles_whole(step: Callable[[Tensor], tuple[Tensor, Tensor]], pred: Tensor, output: str) -> None:
    """Hold a compiled step, without a break in its graph, to the step: its total, `output`, and the total's gradient for `pred`."""
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        given = pred.detach().requires_grad_()
        total, other = function(given)
        results.append((total.detach(), other, *torch.autograd.grad(total, given)))
    for name, eager, compiled in zip(("loss", output, "gradient"), *results):
        assert_close(name, compiled, eager, 1e-6)


def captured(step: Callable[[], Sequence[Tensor]], *, warm: int = 1) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """Return a step's CUDA graph and its outputs there. warm: times that it runs before, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def assert_replays_other_inputs(step: Callable[[], Sequence[Tensor]], static: Sequence[Tensor], fresh: Sequence[Tensor]) -> None:
    """Capture a step that reads `static`, replay it with `fresh` in their place, and hold it to the step itself, bit for bit."""
    graph, outputs = captured(step)
    with torch.no_grad():
        for tensor, new in zip(static, fresh, strict=True):
            tensor.copy_(new)
    graph.replay()
    assert all(torch.equal(output, expected) for output, expected in zip(outputs, step(), strict=True))
