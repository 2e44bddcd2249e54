"""A linear layer with an adapter, y = x W^T + b + s x A^T B^T, no operator of arcopo_kernels.

FLOP: its products, and in a backward pass those for the gradients of x, A and B. The yardsticks are the formula written out, peft's own
layer, which computes float32 adapters in float32, and the frozen layer alone, which none with an adapter beats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("pydantic")
pytest.importorskip("peft")

from arcopo_fast.model.lora import adapter_parameters, add_lora
from benchmarks import shapes
from benchmarks.measure import Bench, Other
from benchmarks.timing import Call


class Layer(NamedTuple):
    """The sizes of a layer: `batch` chunks of tokens, inputs and outputs, and the adapter's rank."""

    name: str
    batch: int
    tokens: int
    inputs: int
    outputs: int
    rank: int
    backward: bool = False


def of_wan(name: str, batch: int, *, backward: bool = False) -> Layer:
    inputs, outputs = {"to_q": (1536, 1536), "ffn up": (1536, 8960), "ffn down": (8960, 1536)}[name]
    return Layer(name, batch, shapes.WAN_1_3B.chunk, inputs, outputs, 64, backward)


LAYERS = shapes.cases(
    gpu=[
        *(of_wan(name, batch) for name in ("to_q", "ffn up", "ffn down") for batch in (1, 4)),
        *(of_wan(name, 1, backward=True) for name in ("to_q", "ffn up", "ffn down")),
    ],
    cpu=[Layer("small", 2, 37, 24, 40, 3), Layer("small", 2, 37, 24, 40, 3, backward=True)],
)


@pytest.mark.parametrize("shape", LAYERS, ids=lambda s: f"{s.name}-B{s.batch}-{'backward' if s.backward else 'forward'}")
def test_adapted_layer(plain_bench: Bench, shape: Layer) -> None:
    from peft.tuners.lora import Linear

    layer = nn.Sequential(nn.Linear(shape.inputs, shape.outputs, device=shapes.DEVICE, dtype=shapes.ACTIVATIONS))
    add_lora(layer, rank=shape.rank, alpha=2 * shape.rank, targets=["0"], seed=0)
    down, up = adapter_parameters(layer)
    nn.init.normal_(up, std=0.02)
    base: Any = layer[0].base_layer  # type: ignore[union-attr]
    rows = shape.batch * shape.tokens
    x = torch.randn(rows, shape.inputs, device=shapes.DEVICE, dtype=shapes.ACTIVATIONS).requires_grad_(shape.backward)

    def written_out() -> Tensor:
        return base(x) + functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype)) * 2.0

    def forward(call: Call) -> Call:
        return call if shape.backward else torch.no_grad()(call)

    leaves: Sequence[Tensor] = [x, down, up] if shape.backward else []
    product, adapter = 2 * rows * shape.inputs * shape.outputs, 2 * rows * shape.rank * (shape.inputs + shape.outputs)
    ends = rows * (shape.inputs + shape.outputs) * x.element_size()
    frozen = {} if shape.backward else {"the frozen layer alone": Other(forward(lambda: base(x)), competes=False)}
    plain_bench(
        "adapted layer",
        f"{shape.name} B={shape.batch} T={shape.tokens} {shape.inputs}->{shape.outputs} r={shape.rank}",
        forward(lambda: layer(x)),
        reference=forward(written_out),
        traffic=base.weight.nbytes + ends + (base.weight.nbytes + ends + x.nbytes if shape.backward else 0),
        flops=product + adapter + (product + 2 * adapter if shape.backward else 0),
        gradients=leaves,
        others={"peft": Other(forward(lambda: Linear.forward(layer[0], x)), leaves)} | frozen,
    )
