"""Linear layers with LoRA: q, k and v together, the feed-forward's first with GELU, and its second.

FLOP: the frozen products and the adapters', in a backward pass those for the gradients of x, A and B. Traffic: inputs, weights and
outputs, each once, but not what lies between: the floor is that of products which add the adapter and apply GELU before they write.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from arcopo_kernels.lora_linear import lora_linear, lora_linears
from torch import Tensor

from benchmarks import shapes
from benchmarks.measure import Bench, Other


class Layers(NamedTuple):
    """`layers` linear layers that read one tensor, over `rows` tokens."""

    name: str
    rows: int
    inputs: int
    outputs: int
    rank: int
    layers: int = 1
    gelu: bool = False
    backward: bool = False


def of_wan(name: str, batch: int, *, backward: bool = False) -> Layers:
    rows = batch * shapes.WAN_1_3B.chunk
    if name == "q, k, v":
        return Layers(name, rows, 1536, 1536, 64, layers=3, backward=backward)
    inputs, outputs = (1536, 8960) if name == "ffn up, GELU" else (8960, 1536)
    return Layers(name, rows, inputs, outputs, 64, gelu=inputs < outputs, backward=backward)


NAMES = ("q, k, v", "ffn up, GELU", "ffn down")
CASES = shapes.cases(
    gpu=[*(of_wan(name, batch) for name in NAMES for batch in (1, 4)), *(of_wan(name, 1, backward=True) for name in NAMES)],
    cpu=[Layers("small", 37, 24, 40, 3, layers, gelu, backward) for layers, gelu, backward in ((3, False, False), (1, True, True))],
)


@pytest.mark.parametrize("shape", CASES, ids=lambda s: f"{s.name}-{s.rows}-{'backward' if s.backward else 'forward'}")
def test_lora_linear(bench: Bench, shape: Layers) -> None:
    new: dict[str, Any] = {"device": shapes.DEVICE, "dtype": shapes.ACTIVATIONS}
    x = torch.randn(shape.rows, shape.inputs, **new).requires_grad_(shape.backward)
    weights = [torch.randn(shape.outputs, shape.inputs, **new) / shape.inputs**0.5 for _ in range(shape.layers)]
    biases = [torch.randn(shape.outputs, **new) for _ in range(shape.layers)]
    down = torch.randn(shape.layers, shape.rank, shape.inputs, **new) / shape.inputs**0.5
    up = 0.1 * torch.randn(shape.layers, shape.outputs, shape.rank, **new)
    leaves = [x, down.requires_grad_(), up.requires_grad_()] if shape.backward else []

    def call() -> Tensor | list[Tensor]:
        if shape.layers > 1:
            return lora_linears(x, weights, biases, down, up, 2.0, gelu=shape.gelu)
        return lora_linear(x, weights[0], biases[0], down[0], up[0], 2.0, gelu=shape.gelu)

    def frozen() -> list[Tensor]:
        return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases)]

    product = 2 * shape.rows * shape.inputs * shape.outputs * shape.layers
    adapter = 2 * shape.rows * shape.rank * (shape.inputs + shape.outputs) * shape.layers
    frozen_bytes, outputs = sum(weight.nbytes for weight in weights), shape.rows * shape.outputs * shape.layers * x.element_size()
    traffic = frozen_bytes + x.nbytes + outputs
    bench(
        "lora_linears" if shape.layers > 1 else "lora_linear",
        f"{shape.name} T={shape.rows} {shape.inputs}->{shape.outputs} r={shape.rank}",
        call,
        traffic=traffic + shape.backward * (frozen_bytes + outputs * (1 + shape.gelu) + 2 * x.nbytes),
        flops=product + adapter + shape.backward * (product + 2 * adapter),
        gradients=leaves,
        others={} if shape.backward else {"the frozen layers alone": Other(frozen, competes=False)},
    )
