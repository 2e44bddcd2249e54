"""The formulas of an iteration's work count what PyTorch counts, and what the cost model says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import arcopo_kernels
import pytest
import torch
from arcopo_kernels.dispatch import INTERPRETED
from support.measure import MovedBytes
from support.models import random_text, small_config, small_model
from support.replay import Replay
from torch.utils.flop_counter import FlopCounterMode

from arcopo_fast.build import build_engine
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.model.families import published
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.model.sizes import GeneratorSizes, VAESizes
from arcopo_fast.planning import work as work_of
from arcopo_fast.planning.work import AttentionBackward
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.graphs import LAUNCHES_OF_A_BLOCK
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.stream import VideoShape
from benchmarks.iteration import changed

DENSE = AttentionBackward(2.5, 2.5)
"""What kernels without a notion of frozen keys do."""
STORED = AttentionBackward(1.0, 2.0)
"""Where the forward keeps the scores: dP and dQ, dK and dV."""
MODEL = small_config()
SMALL = [
    *("video.chunks=3", "video.chunk_frames=2", "video.latent_height=4", "video.latent_width=6", "sampler.steps=[1000, 750, 500]"),
    *("rollout.group_size=3", "rollout.branches_per_wave=null", "objective.micro_batch=null", "objective.anchors_per_update=3"),
    *("lora.rank=4", "lora.alpha=8"),
]
SHAPE = VideoShape((2,) * 3, 8, 4, 6)
WAN = published("1.3b").transformer
FULL = load_config("bench_1_3b", ["objective.micro_batch=null"])


def small(*overrides: str) -> Config:
    return load_config("bench_1_3b", [*SMALL, *overrides])


def counted(call: Callable[[], Any]) -> float:
    # PyTorch does not count its fused attention for CPUs.
    with arcopo_kernels.use("reference"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def engine_of(config: Config) -> Engine:
    model = add_lora(small_model(), rank=config.lora.rank, alpha=8, targets=config.lora.targets, seed=1)
    return build_engine(config, model)


FEW = "lora.targets=[attn1.to_v, attn2.to_k, ffn.net.2]"
"""Targets of another adapter: keys and values of one kind each."""


@pytest.mark.parametrize("pivot", range(3))
@pytest.mark.parametrize("overrides", [[], ["cache.window=4", "cache.sink=1"], [FEW]], ids=["global", "window", "few adapters"])
def test_a_rollout_counts_what_pytorch_counts(pivot: int, overrides: list[str]) -> None:
    config = small(*overrides)
    engine, noise, group = engine_of(config), KeyedNoise(SHAPE, GroupId(seed=1)), config.rollout.group_size
    # A clean pass embeds its timestep once for the whole batch; the formula is of one video.
    shared = 2 * (MODEL.freq_dim * MODEL.dim + 7 * MODEL.dim**2) * (group - 1) * (SHAPE.chunks - 1 - pivot)
    with torch.no_grad():
        flops = counted(lambda: engine.rollout(random_text(), noise.id, pivot=pivot, members=group, plan=NoisePlan(0.5)).release())
    work = work_of.iteration(config, MODEL, None, pivot)
    expected = work_of.text(config, MODEL).flops + sum(work[stage].flops for stage in ("prefix", "denoise", "clean") if stage in work)
    assert flops == expected - shared


@pytest.mark.parametrize("pivot", range(3))
def test_a_replay_counts_what_pytorch_counts(pivot: int) -> None:
    config = small()
    engine, noise = engine_of(config), KeyedNoise(SHAPE, GroupId(seed=1))
    items = torch.tensor([0, 2, 1])
    with engine.rollout(random_text(), noise.id, pivot=pivot, members=3, plan=NoisePlan(0.5)) as group:
        flops = counted(lambda: engine.predict(group, group.samples(items, items.flip(0))).sum().backward())
        without_gradient = counted(lambda: torch.no_grad()(engine.predict)(group, group.samples(items, items)))
    frames, visible = SHAPE.chunk_frames[pivot], work_of.visible_frames(config, MODEL, pivot)
    pair, text = work_of.replay(config, MODEL, frames, visible, STORED), work_of.text(config, MODEL, backward=True)
    assert flops == (pair * 3 + text).flops
    assert without_gradient == (work_of.forward(config, MODEL, frames, visible) * 3 + work_of.text(config, MODEL)).flops


@pytest.mark.skipif(not INTERPRETED, reason="counts what the fused operators move, in Triton's interpreter")
def test_what_lies_between_the_products_is_fused() -> None:
    """At full size a block's passes are those that are counted and GELU's two, which are no product's epilogue; little else moves. So are
    its launches."""
    config = load_config("bench_1_3b", ["objective.micro_batch=2"])
    moved, calls = {}, {}
    for layers in (1, 3):
        one = Replay(config, GeneratorSizes(replace(WAN, num_layers=layers)), "meta")
        with arcopo_kernels.use("triton"), torch.no_grad():
            text, counter = one.network.encode_text(one.text), MovedBytes()
            with counter:
                one.network(one.x, one.t, text, one.context)
        moved[layers], calls[layers] = counter.outside("mm", "attention", "linear"), counter.calls.total()
    hidden = 2 * 3 * work_of.frame_tokens(config, WAN) * WAN.dim * 2
    gelu = 2 * WAN.ffn_dim / WAN.dim
    assert (moved[3] - moved[1]) / 2 / hidden == pytest.approx(work_of.BLOCK_PASSES + gelu, rel=0.02)
    of_two_segments = 2  # beside the first one's: the second one's, and the merge
    assert (calls[3] - calls[1]) / 2 + of_two_segments == LAUNCHES_OF_A_BLOCK


def test_an_iterations_replay_is_made_of_its_items() -> None:
    config = small("objective.anchors_per_update=2", "objective.updates=3", "objective.micro_batch=4")
    pair, forward = work_of.replay(config, MODEL, 2, 4), work_of.forward(config, MODEL, 2, 4)
    text, trained = work_of.text(config, MODEL), work_of.text(config, MODEL, backward=True)
    work = work_of.iteration(config, MODEL, None, 1)  # 2 anchors at 3 steps in micro-batches of 4: the prompt is encoded twice
    assert work["replay"].flops == pytest.approx((pair * 18 + trained * 6 + forward * 12 + text * 4).flops)
    assert work["optimizer"].flops == 0 < work["optimizer"].traffic


@pytest.mark.parametrize("overrides", [[], [FEW]], ids=["all", "few"])
def test_the_adapters_parameters_are_counted(overrides: list[str]) -> None:
    config = small(*overrides)
    assert work_of.lora_parameters(config, MODEL) == sum(p.numel() for p in adapter_parameters(engine_of(config).model))


@pytest.mark.parametrize("residual", [False, True], ids=["Wan2.1", "residual"])
def test_decoding_counts_what_pytorch_counts(residual: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    extra = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "is_residual": residual, "out_channels": 3 + residual}
    with torch.device("meta"):  # PyTorch does not count its flash attention for CPUs
        vae = diffusers.AutoencoderKLWan(**sizes, **extra)
        flops = counted(lambda: vae.decode(torch.empty(1, 4, 3, 6, 4)))
    assert work_of.decode(VAESizes.from_config(vae.config), 6, 4, 3).flops == flops


def test_only_the_window_and_its_warm_up_are_decoded() -> None:
    """Six shared frames after four that are dropped, and the branches' own nine; the video may be as long as it likes."""
    sizes, window = VAESizes(), ["rollout.horizon=2", "judge.before=6", "judge.warmup=4", "video.chunk_frames=3", "rollout.group_size=5"]
    expected = work_of.decode(sizes, 4, 6, 10) + work_of.decode(sizes, 4, 6, 9, start=False) * 5
    for chunks, pivot in ((20, 7), (20, 17), (80, 60)):
        counts = work_of.iteration(small(*window, f"video.chunks={chunks}"), MODEL, sizes, pivot)
        assert counts["decode"] == expected
    first = work_of.iteration(small(*window, "video.chunks=20"), MODEL, sizes, 0)
    assert first["decode"] == work_of.decode(sizes, 4, 6, 9) * 5


def test_decoding_counts_at_full_size() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan()
        flops = counted(lambda: vae.decode(torch.empty(1, 16, 2, 60, 104)))
    assert work_of.decode(VAESizes.from_config(vae.config), 60, 104, 2).flops == flops
    assert VAESizes.from_config(vae.config) == VAESizes()


# Of Wan2.1-1.3B at 480x832, TFLOP by pivot: prefix, denoising, clean passes, decoding, replay with dense attention backward. An independent
# count: without LoRA but in the replay, clean passes to the end, and without the prompt and the later updates' old predictions.
COST_MODEL = {
    1: (0, 9507, 1892, 3304, 1319),
    2: (81, 8730, 1698, 2958, 1771),
    3: (182, 7760, 1455, 2511, 2223),
    4: (303, 6595, 1164, 2064, 2675),
    5: (445, 5237, 824, 1617, 3127),
    6: (606, 3685, 436, 1170, 3580),
    7: (788, 1940, 0, 723, 4032),
}


def test_the_constants_of_the_cost_model() -> None:
    one = work_of.forward(FULL, WAN, 3, 3)
    assert one.linear / 1e12 == pytest.approx(11.71, rel=5e-3) and one.lora / one.linear == pytest.approx(0.061, rel=0.02)
    assert one.self_attention / 1e12 == pytest.approx(4.04, rel=2e-3) and one.cross_attention / 1e12 == pytest.approx(0.44, rel=0.01)
    first, two = (work_of.decode(VAESizes(), 60, 104, frames).vae / 1e12 for frames in (1, 2))
    assert first == pytest.approx(4.35, rel=2e-3) and two - first == pytest.approx(13.55, rel=1e-3)


@pytest.mark.parametrize("pivot", COST_MODEL)
def test_the_full_size_agrees_with_the_cost_model(pivot: int) -> None:
    prefix, denoise, clean, vae, replay = COST_MODEL[pivot]
    bare = changed(FULL, lora={"rank": 0})
    work = work_of.iteration(bare, WAN, VAESizes(), pivot - 1)
    visible = 3 * pivot
    # The cost model's clean passes run to the end.
    whole = [work_of.forward(bare, WAN, 3, 3 * chunk).flops / 1e12 for chunk in range(1, 8)]
    assert 5 * sum(whole[: pivot - 1]) == pytest.approx(prefix, rel=0.02)
    assert work["denoise"].flops / 1e12 == pytest.approx(denoise, rel=0.02)
    assert 12 * sum(whole[pivot - 1 : 6]) == pytest.approx(clean, rel=0.02)
    assert work["decode"].flops / 1e12 == pytest.approx(vae, rel=0.02)
    assert 32 * work_of.replay(FULL, WAN, 3, visible, DENSE).flops / 1e12 == pytest.approx(replay, rel=0.02)
    # What is counted as needed is a little less: the last block of a clean pass, and no gradient of cached keys.
    if "clean" in work:
        assert 0.9 * clean < work["clean"].flops / 1e12 < clean
    assert work_of.replay(FULL, WAN, 3, visible).flops <= work_of.replay(FULL, WAN, 3, visible, DENSE).flops
