"""Layers that take time and are no operators of arcopo_kernels: a linear layer with an adapter, and the VAE's decoder.

An adapted layer, y = x W^T + b + s x A^T B^T. FLOP: its products, and in a backward pass those for the gradients of x, A and B. The
yardsticks are the formula written out, peft's own layer, which computes float32 adapters in float32, and the frozen layer alone, which none
with an adapter beats.

The decoder: one call for the next latent frames of a video, against diffusers'. FLOP as `arcopo_fast.planning.work` counts
them, those of diffusers' decoder; ours needs fewer, for it convolves before it upsamples. Listed below: cuDNN's algorithms chosen by trial
instead of by rule.
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
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.model.untrained import untrained_vae
from arcopo_fast.model.vae import StreamingDecoder, channels_last, fork
from arcopo_fast.planning.work import decode
from benchmarks import shapes
from benchmarks.measure import Bench, Other
from benchmarks.timing import Call


@pytest.fixture
def plain_bench(bench: Bench) -> Bench:
    """Without torch.compile, and without block sizes to sweep."""
    if bench.swept:
        pytest.skip("there are no block sizes here")
    bench.compiled = False
    return bench


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


class Decoding(NamedTuple):
    """`frames` latent frames of `batch` videos in one call."""

    sizes: VAESizes
    batch: int
    frames: int
    height: int
    width: int


DECODINGS = shapes.cases(
    gpu=[Decoding(VAESizes(), batch, frames, 60, 104) for batch, frames in ((1, 1), (1, 2), (4, 1))],
    cpu=[Decoding(VAESizes(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temperal_downsample=(True,)), 2, 1, 4, 6)],
)


@torch.no_grad()
def diffusers_decoder(vae: Any, past: Tensor, latents: Tensor) -> Call:
    """Decodes `latents` [B, F, C, h, w] to frames, by diffusers' decoder after it has seen `past`, again and again from the same state."""
    mean, std = (torch.tensor(vae.config[name], device=past.device).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    before, raw = (vae.post_quant_conv((z.movedim(2, 1) * std + mean).to(vae.dtype)) for z in (past, latents))

    def decode_frames(z: Tensor, *, first: bool) -> Tensor:
        frames = []
        for index, frame in enumerate(z.split(1, dim=2)):
            more = {"first_chunk": True} if first and not index else {}
            frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=[0], **more))
        return torch.cat(frames, dim=2).movedim(2, 1).float().clamp(-1, 1) * 0.5 + 0.5

    vae.clear_cache()
    decode_frames(before, first=True)
    history = list(vae._feat_map)

    @torch.no_grad()
    def call() -> Tensor:
        vae._feat_map = list(history)
        return decode_frames(raw, first=False)

    return call


@pytest.mark.parametrize("shape", DECODINGS, ids=lambda s: f"B{s.batch}-F{s.frames}")
def test_decoder(plain_bench: Bench, shape: Decoding) -> None:
    pytest.importorskip("diffusers", exc_type=ImportError)
    ours, theirs = (untrained_vae(shape.sizes, dtype=shapes.ACTIVATIONS, device=shapes.DEVICE, seed=0) for _ in range(2))
    decoder = StreamingDecoder(channels_last(ours), shape.frames)
    frame = (shape.sizes.z_dim, shape.height, shape.width)
    past, latents = torch.randn(1, 2, *frame, device=shapes.DEVICE), torch.randn(shape.batch, shape.frames, *frame, device=shapes.DEVICE)
    cache = fork(decoder.decode(past, decoder.start())[1], shape.batch)

    def call() -> Tensor:
        return decoder.decode(latents, cache)[0]

    def by_trial() -> Tensor:
        # Plans are kept by a call's description, whoever chose them. Whether TF32 may be used is part of it, and bfloat16 never uses it.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            return call()

    plain_bench(
        "vae decoder",
        f"B={shape.batch} F={shape.frames} {shape.height}x{shape.width} latents",
        call,
        reference=diffusers_decoder(theirs, past.expand(shape.batch, -1, -1, -1, -1), latents),
        traffic=sum(parameter.nbytes for parameter in ours.decoder.parameters()) + latents.nbytes + call().nbytes,
        flops=shape.batch * decode(shape.sizes, shape.height, shape.width, shape.frames, start=False).vae,
        others={"cudnn.benchmark": Other(by_trial, competes=False)} if latents.is_cuda else {},
    )
