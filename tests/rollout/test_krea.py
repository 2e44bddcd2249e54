"""Krea's recomputed context: against a dense implementation in Krea's order of operations, and what a group makes of it."""

from __future__ import annotations

import math
from collections import deque
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from support.krea import StandIn
from support.models import random_text, small_model
from torch import Tensor, nn

from arcopo_fast.config.sections import CacheConfig, SamplerConfig
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.rollout.cache import pages_for, plan_pages
from arcopo_fast.rollout.decode import Reencoder
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.stream import VideoShape

CHUNK = 2
SHAPE = VideoShape((CHUNK,) * 6, 4, 4, 6)
SAMPLER = SamplerConfig(steps=[1000, 500, 0], warp=True, shift=5.0)  # a last step at t = 0, as Krea's
STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 2.0, 1.1]}
FACTOR = 4  # pixel frames of a latent frame


def small_vae(dtype: torch.dtype = torch.float64) -> AutoencoderKLWan:
    config: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    vae = AutoencoderKLWan(**config, **STATISTICS, scale_factor_spatial=4).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.3)
    vae.decoder.conv_out.weight *= 4  # so that some pixels are clamped
    return vae.to(dtype)


def engine_of(model: CausalWan, policy: CacheConfig, reencoder: Reencoder | None = None, branches: int = 4) -> Engine:
    pages = pages_for(policy, SHAPE.chunk_frames, branches)
    return Engine(model, SHAPE, SAMPLER, policy, pages=pages, reencoder=reencoder or StandIn())


def noise_of(shape: VideoShape = SHAPE) -> KeyedNoise:
    return KeyedNoise(shape, GroupId(seed=int(torch.randint(10**6, ()))))


# The dense implementation ----------------------------------------------------------------------------------------------------------


def rope(x: Tensor, places: Sequence[int], rows: int, columns: int) -> Tensor:
    """x [1, tokens, H, D], frame by frame at time positions `places`."""
    half = x.shape[-1] // 2
    grid = torch.meshgrid(torch.tensor(places), torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = []
    for position, pairs in zip(grid, (half - 2 * (half // 3), half // 3, half // 3)):
        angles.append(position.reshape(-1, 1).double() / 10000.0 ** (torch.arange(pairs, dtype=torch.float64) / pairs))
    angle = torch.cat(angles, dim=1)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1).flatten(-2)


def dense_flow(model: CausalWan, x: Tensor, t: Sequence[float], text: Tensor, sees: Tensor) -> Tensor:
    """The flow of all frames x [1, F, C, h, w] at once, at time positions 0 to F - 1.

    t: of each frame. text [F, length, text_dim]: what each frame is told. sees [F, F]: whether a frame (row) attends to another (column).
    """
    weights, config, frames = dict(model.named_parameters()), model.config, x.shape[1]

    def linear(name: str, y: Tensor) -> Tensor:
        return F.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], eps=config.eps)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (config.num_attention_heads, -1))

    def qk(name: str, norm: str, y: Tensor) -> Tensor:
        y = linear(name, y)
        return heads(y / (y.square().mean(-1, keepdim=True) + config.eps).sqrt() * weights[f"{norm}.weight"])

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    patches = F.conv3d(x.transpose(1, 2), weights["patch_embedding.weight"], weights["patch_embedding.bias"], stride=config.patch_size)
    rows, columns = patches.shape[-2:]
    hidden = patches.flatten(2).transpose(1, 2)  # [1, tokens, E]
    half = config.freq_dim // 2
    angle = torch.tensor(t, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    embedded = linear("condition_embedder.time_embedder.linear_1", torch.cat([angle.cos(), angle.sin()], dim=1))
    embedded = linear("condition_embedder.time_embedder.linear_2", F.silu(embedded))  # [F, E]
    modulation = linear("condition_embedder.time_proj", F.silu(embedded)).unflatten(1, (6, -1))
    prompt = linear("condition_embedder.text_embedder.linear_1", text.double())
    prompt = linear("condition_embedder.text_embedder.linear_2", F.gelu(prompt, approximate="tanh"))
    tokens = rows * columns
    mask = sees.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def of_tokens(of_frames: Tensor) -> Tensor:
        return of_frames.repeat_interleave(tokens, 0)[None]

    for block in range(config.num_layers):
        name = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (weights[f"{name}.scale_shift_table"] + modulation).unbind(1)
        y = layer_norm(hidden) * (1 + of_tokens(scale1)) + of_tokens(shift1)
        q, k = (rope(qk(f"{name}.attn1.to_{part}", f"{name}.attn1.norm_{part}", y), range(frames), rows, columns) for part in "qk")
        y = attend(q, k, heads(linear(f"{name}.attn1.to_v", y)), mask)
        hidden = hidden + linear(f"{name}.attn1.to_out.0", y) * of_tokens(gate1)
        y = layer_norm(hidden) * weights[f"{name}.norm2.weight"] + weights[f"{name}.norm2.bias"]
        q = qk(f"{name}.attn2.to_q", f"{name}.attn2.norm_q", y).view(frames, tokens, config.num_attention_heads, -1)
        k = qk(f"{name}.attn2.to_k", f"{name}.attn2.norm_k", prompt)
        y = attend(q, k, heads(linear(f"{name}.attn2.to_v", prompt))).reshape(1, frames * tokens, -1)
        hidden = hidden + linear(f"{name}.attn2.to_out.0", y)
        y = linear(f"{name}.ffn.net.0.proj", layer_norm(hidden) * (1 + of_tokens(scale2)) + of_tokens(shift2))
        hidden = hidden + linear(f"{name}.ffn.net.2", F.gelu(y, approximate="tanh")) * of_tokens(gate2)
    shift, scale = (weights["scale_shift_table"] + embedded[:, None]).unbind(1)
    out = linear("proj_out", layer_norm(hidden) * (1 + of_tokens(scale)) + of_tokens(shift))
    out = out.view(1, frames, rows, columns, 2, 2, config.out_channels)
    return torch.einsum("bfrcyxo->bforycx", out).reshape(x.shape)


Pixels = Callable[[Tensor], Tensor]


def dense_krea(
    model: CausalWan, text: Sequence[Tensor], noise: KeyedNoise, context_frames: int, keep_first: bool, decode: Pixels, encode: Pixels
) -> Tensor:
    """Latents [1, frames, C, h, w] of a video as Krea's server makes it.

    text: of each chunk. decode: all latents so far -> all pixel frames so far [1, F, ...]. encode: one of them -> a latent frame.
    """
    u = torch.linspace(1, 0, 1001)[:-1]
    table = 5 * u / (1 + 4 * u)  # sigmas, float32 as the official table
    steps = [float(1000 * table[0]), float(1000 * table[500]), 0.0]
    sigmas = [float(table[0]), float(table[500]), float(table[-1])]  # for t = 0 the table's last entry
    latents = torch.zeros(1, 0, *SHAPE.chunk(0)[1:], dtype=torch.float64)
    pixels: deque[Tensor] = deque(maxlen=1 + (context_frames - 1) * FACTOR)
    for block in range(SHAPE.chunks):
        context, told = latents, text[block].expand(CHUNK, -1, -1)
        if block:
            first = latents[:, :1]
            if not keep_first and (block - 1) * CHUNK >= context_frames:
                first = encode(pixels[0])
            later = latents[:, 1:]
            context = torch.cat([first, later[:, max(0, later.shape[1] - context_frames + 1) :]], dim=1)
            told = torch.cat([text[block - 1].expand(context.shape[1], -1, -1), told])  # the context is computed before the prompt changes
        known = context.shape[1]
        assert known == min(latents.shape[1], context_frames)
        sees = torch.ones(known + CHUNK, known + CHUNK, dtype=torch.bool)
        for frame in range(known):
            sees[frame, (frame // CHUNK + 1) * CHUNK :] = sees[frame, known:] = False
        x = noise.initial(block).double()
        for step, (t, sigma) in enumerate(zip(steps, sigmas)):
            flow = dense_flow(model, torch.cat([context, x], dim=1), [0.0] * known + [t] * CHUNK, told, sees)[:, known:]
            clean = x - sigma * flow
            if step + 1 < len(steps):
                x = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * noise.renoise(block, step)  # the draw is float32
        latents = torch.cat([latents, clean], dim=1)
        pixels.extend(decode(latents)[:, -CHUNK * FACTOR :].split(1, dim=1))  # of the first chunk less: a video's first latent gives one
    return latents


def of_vae(vae: AutoencoderKLWan) -> tuple[Pixels, Pixels]:
    """Decoding and encoding by diffusers alone, of whole clips."""
    mean, std = (torch.tensor(STATISTICS[name], dtype=torch.float64).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)

    def encode(pixels: Tensor) -> Tensor:
        return ((vae.encode(pixels.transpose(1, 2)).latent_dist.mode() - mean) / std).transpose(1, 2)

    return decode, encode


# Against it ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_frames, keep_first", [(2, False), (3, False), (4, False), (3, True), (1, True)])
@torch.no_grad()
def test_the_dense_implementation(context_frames: int, keep_first: bool) -> None:
    """With 3 and 4 frames the context has two blocks; with 3 the first frame and the newest ones are not neighbours."""
    model, vae, noise = small_model(torch.float64, in_channels=4, out_channels=4), small_vae(), noise_of()
    prompts, switch = [random_text(), random_text()], 3
    engine = engine_of(model, CacheConfig(variant="krea", window=context_frames + CHUNK, sink=int(keep_first)), Reencoder(vae))
    latents = engine.generate(prompts[0], noise, switches={switch * CHUNK: prompts[1]})
    expected = dense_krea(
        model,
        [prompts[int(block >= switch)] for block in range(SHAPE.chunks)],
        noise,
        context_frames,
        keep_first,
        *of_vae(vae),
    )
    alone = SHAPE.frames if keep_first else context_frames + CHUNK  # before anything went through the VAE, which is good to 1e-9
    torch.testing.assert_close(latents[:, :alone], expected[:, :alone], rtol=0, atol=1e-12)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-7)
    assert engine.pool.pages_in_use == 0


def test_without_a_mask_the_videos_differ() -> None:
    """The reference above could not tell a block-causal context from a bidirectional one if there were no difference."""
    model, x, text = small_model(torch.float64, in_channels=4, out_channels=4), torch.randn(1, 5, 4, 4, 6).double(), random_text()
    sees = torch.ones(5, 5, dtype=torch.bool)
    everything = dense_flow(model, x, [0.0] * 5, text.expand(5, -1, -1), sees)
    sees[:2, 2:] = False
    assert (dense_flow(model, x, [0.0] * 5, text.expand(5, -1, -1), sees) - everything)[:, 2:].abs().max() > 1e-3


# A group ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pivot", [0, 1, 3, 5])
def test_branches_with_a_vae_are_independent_videos(pivot: int) -> None:
    """Each goes on from the decoder's state at the fork, whatever its wave; the group itself holds nothing of the decoder."""
    model, policy, noise = small_model(torch.float64, in_channels=4, out_channels=4), CacheConfig(variant="krea", window=5), noise_of()
    reencoder = Reencoder(small_vae())
    engine, text = engine_of(model, policy, reencoder, branches=2), random_text()
    with engine.rollout(text, noise.id, pivot=pivot, members=3, plan=NoisePlan(0.5), branches_per_wave=2) as group:
        assert engine.pool.peak_in_use == plan_pages(policy, SHAPE.chunk_frames, pivot, 2).pages
        assert group.prefix.cache.decoded == () and group.prefix.cache.frames == min(CHUNK * pivot, 3)
        branches = group.videos()
        rebuilt = engine.rebuild_prefix(text, group.prefix_latents)
        with engine.context(group, group.pivot, torch.tensor([2]), prefix=rebuilt) as context:
            replayed = engine.predict(group, group.samples(torch.tensor([1]), torch.tensor([2])), context=context)
        assert torch.equal(replayed, engine.predict(group, group.samples(torch.tensor([1]), torch.tensor([2]))))
        rebuilt.cache.release()
    initial = noise.neighbors(pivot, range(3), 0.5)

    class Own(KeyedNoise):
        def initial(self, chunk: int) -> Tensor:
            return initial[2:] if chunk == pivot else super().initial(chunk)

    alone = engine.generate(text, Own(noise.shape, noise.id))
    torch.testing.assert_close(branches[2:], alone, rtol=0, atol=1e-12)
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_from_stored_latents_is_the_rollouts(dtype: torch.dtype) -> None:
    """Bit for bit, though it was decoded in other parts: the state of the VAE depends on the latents alone."""
    model, policy = small_model(dtype, in_channels=4, out_channels=4), CacheConfig(variant="krea", window=5)
    engine, text = engine_of(model, policy, Reencoder(small_vae(dtype))), random_text()
    with engine.rollout(text, noise_of().id, pivot=5, members=2, plan=NoisePlan(0.5)) as group:
        stored = group.prefix_latents.cpu().clone()
        rebuilt = engine.rebuild_prefix(text, stored)
        for stream in (group.prefix, rebuilt):
            for step in range(len(group.steps)):
                members = torch.tensor([0, 1])
                with engine.context(group, group.pivot, members, prefix=stream) as context:
                    replayed = engine.predict(group, group.samples(torch.tensor([step, step]), members), context=context)
                assert torch.equal(replayed, group.predictions[step])
        rebuilt.cache.release()


def test_every_latent_is_decoded_once_and_none_ahead_of_need() -> None:
    policy, reencoder = CacheConfig(variant="krea", window=5), StandIn()
    engine = engine_of(small_model(in_channels=4, out_channels=4), policy, reencoder)
    engine.generate(random_text(), noise_of())
    assert reencoder.calls == [4, 2, 2], "3 frames of context before chunks 3, 4 and 5: up to latents 3, 5 and 7"
    reencoder.calls.clear()
    with engine.rollout(random_text(), noise_of().id, pivot=3, members=4, plan=NoisePlan(0.5)):
        assert reencoder.calls == [4] + [2] * 4 * 2, "what the branches share, once"
    reencoder.calls.clear()
    engine.rebuild_prefix(random_text(), torch.randn(1, 5 * CHUNK, *SHAPE.chunk(0)[1:])).cache.release()
    assert reencoder.calls == [8], "one context, after the last chunk"
    reencoder.calls.clear()
    engine = Engine(engine.model, SHAPE, SAMPLER, policy.model_copy(update={"sink": 1}), pages=12)
    engine.generate(random_text(), noise_of())
    assert not reencoder.calls


def test_a_vae_that_waits_elsewhere_is_fetched_once_for_all_videos() -> None:
    events: list[str] = []

    @contextmanager
    def at_work() -> Iterator[None]:
        events.append("there")
        yield
        events.append("away")

    engine = engine_of(
        small_model(in_channels=4, out_channels=4), CacheConfig(variant="krea", window=5), Reencoder(small_vae(torch.float32), at_work)
    )
    engine.generate(random_text(2), noise_of())
    assert events == ["there", "away"] * 3


def test_the_pages_of_full_size() -> None:
    """Krea's 3 + 3 frames: a group never holds more than 3 pages for the prefix and 3 for each branch."""
    shape, policy = VideoShape((3,) * 7, 16, 60, 104), CacheConfig(variant="krea", window=6)
    plans = [plan_pages(policy, shape.chunk_frames, pivot, 12) for pivot in range(7)]
    assert [(plan.prefix, plan.tail) for plan in plans] == [(0, 3), *[(3, 3)] * 5, (3, 0)]
    assert pages_for(policy, shape.chunk_frames, 12) == 39
    longer = CacheConfig(variant="krea", window=8)
    assert [plan_pages(longer, shape.chunk_frames, pivot, 12).prefix for pivot in range(4)] == [0, 3, 5, 5]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a cache.window, and a cache.sink of 0 or 1; given cache.window null and cache.sink 0"):
        CacheConfig(variant="krea")
    with pytest.raises(ValueError, match="given cache.window 6 and cache.sink 2"):
        CacheConfig(variant="krea", window=6, sink=2)
    model = small_model(in_channels=4, out_channels=4)
    with pytest.raises(ValueError, match="give a reencoder"):
        Engine(model, SHAPE, SAMPLER, CacheConfig(variant="krea", window=4), pages=8)
    with pytest.raises(ValueError, match="a window of 2 frames has no room for a context beside a chunk of 2"):
        pages_for(CacheConfig(variant="krea", window=2), SHAPE.chunk_frames, 2)
