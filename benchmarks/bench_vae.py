"""The VAE's decoder: one call for the next latent frames of a video, against diffusers'.

FLOP as `arcopo_fast.planning.work` counts them, those of diffusers' decoder; ours needs fewer, for it convolves before it upsamples. Listed
below: cuDNN's algorithms chosen by trial instead of by rule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("pydantic")
pytest.importorskip("peft")

from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.model.untrained import untrained_vae
from arcopo_fast.model.vae import StreamingDecoder, channels_last, fork
from arcopo_fast.planning.work import decode
from benchmarks import shapes
from benchmarks.measure import Bench, Other
from benchmarks.timing import Call


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
    streamed, plain = (untrained_vae(shape.sizes, dtype=shapes.ACTIVATIONS, device=shapes.DEVICE, seed=0) for _ in range(2))
    decoder = StreamingDecoder(channels_last(streamed), shape.frames)
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
        reference=diffusers_decoder(plain, past.expand(shape.batch, -1, -1, -1, -1), latents),
        traffic=sum(parameter.nbytes for parameter in streamed.decoder.parameters()) + latents.nbytes + call().nbytes,
        flops=shape.batch * decode(shape.sizes, shape.height, shape.width, shape.frames, start=False).vae,
        others={"cudnn.benchmark": Other(by_trial, competes=False)} if latents.is_cuda else {},
    )
