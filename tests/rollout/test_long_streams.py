"""Groups anywhere in a long stream: horizons, and the memory that they take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import SAMPLER, random_text, small_model

from arcopo_fast.config.schema import CacheConfig
from arcopo_fast.rollout.cache import pages_for, plan_pages
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, NoisePlan
from arcopo_fast.rollout.stream import VideoShape

LONGLIVE = CacheConfig(variant="longlive", window=12, sink=3)  # with chunks of 3
TOY = CacheConfig(variant="longlive_infinity", window=8, sink=2)  # with chunks of 2
GROUP = 12
NAME = GroupId(seed=7, iteration=2, group=1)


def engine_of(cache: CacheConfig, chunks: int, chunk_frames: int, pages: int, layers: int = 2) -> Engine:
    shape = VideoShape((chunk_frames,) * chunks, 8, 2, 2)
    return Engine(small_model(num_layers=layers), shape, SAMPLER.model_copy(update={"steps": [1000, 500]}), cache, pages=pages)


@pytest.mark.parametrize("chunks", [20, 40, 80])
def test_pages_do_not_grow_with_the_video(chunks: int) -> None:
    """LONGLIVE and TOY at a group of 12: the same whatever the length, and as planned."""
    for cache, chunk_frames, expected in ((LONGLIVE, 3, [12, 48, 84]), (TOY, 2, [8, 32, 56, 80])):
        frames = (chunk_frames,) * chunks
        pages = [pages_for(cache, frames, GROUP, horizon=horizon) for horizon in range(len(expected))]
        late = [plan_pages(cache, frames, chunks - 1 - horizon, GROUP, horizon=horizon).pages for horizon in range(len(expected))]
        assert late == expected and all(most >= page for most, page in zip(pages, late))
    engine = engine_of(LONGLIVE, chunks, 3, pages=84, layers=1)
    pivot = chunks - 3
    with engine.rollout(random_text(), NAME, pivot=pivot, members=GROUP, plan=NoisePlan(0.5), horizon=2) as group:
        assert engine.pool.peak_in_use == 84 and group.tails.shape[:2] == (GROUP, 9)
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("explored", [1, None])
@pytest.mark.parametrize("cache", [CacheConfig(), TOY, CacheConfig(variant="krea", window=5, sink=1)], ids=["global", "toy", "krea"])
def test_a_horizon_makes_the_first_chunks_of_the_whole_group(cache: CacheConfig, explored: int | None) -> None:
    """Chunks p to p + H are those of the group to the video's end, and no others are made."""
    engine, text = engine_of(cache, 6, 2, pages_for(CacheConfig(), (2,) * 6, 3)), random_text()
    plan = replace(NoisePlan(0.5), chunks=explored)
    with engine.rollout(text, NAME, pivot=2, members=3, plan=plan) as whole:
        pass
    for horizon in (0, 1, 3):
        with engine.rollout(text, NAME, pivot=2, members=3, plan=plan, horizon=horizon) as group:
            assert torch.equal(group.tails, whole.tails[:, : 2 * (horizon + 1)])
            assert list(group.explored) == list(whole.explored)[: horizon + 1]
            assert torch.equal(group.predictions, whole.predictions) and torch.equal(group.prefix_latents, whole.prefix_latents)
            chunk = max(group.explored)
            samples = group.samples(torch.tensor([0, 1]), torch.tensor([2, 0]), chunk)
            replayed = engine.predict(group, samples).detach()
            torch.testing.assert_close(replayed, group.explored[chunk].predictions[samples.steps, samples.members], rtol=0, atol=1e-5)
    assert engine.pool.pages_in_use == 0
