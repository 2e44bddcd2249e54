"""Prompts that change within a video, several groups of one video, and contexts that are made anew out of a video's history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.adapted import fresh_engine
from support.krea import StandIn
from support.measure import LiveBytes
from support.models import SAMPLER, random_text, small_model
from torch import Tensor

from arcopo_fast.config.schema import CacheConfig
from arcopo_fast.model.lora import adapter_parameters
from arcopo_fast.objectives.copo import CopoObjective, CopoSettings
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.rollout.cache import pages_for, plan_pages
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Branching, Group
from arcopo_fast.rollout.history import Appended, History, Switched
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.stream import Stream, VideoShape

CHUNKS, PIVOT = 10, 7  # of 2 latent frames
CACHES = {
    "global": CacheConfig(),
    "self forcing": CacheConfig(window=6, sink=1),
    "longlive": CacheConfig(variant="longlive", window=6, sink=2),
    "no global sink": CacheConfig(variant="longlive_infinity", window=6, sink=2, global_sink=False),
    "infinity rope": CacheConfig(variant="infinity_rope", window=6, sink=1),
    "krea, first frame kept": CacheConfig(variant="krea", window=5, sink=1),
    "krea": CacheConfig(variant="krea", window=5, sink=0),
}
SWITCHES = {
    "one prompt": [],
    "before the window is full": [4],
    "after it": [10],
    "both": [4, 10],
    "often": [2, 6, 8, 12],
    "at the pivot": [4, 14],
}
ONE_STEP = SAMPLER.model_copy(update={"steps": [1000]})
NAME = GroupId(seed=7, iteration=2, group=1)
TOLERANCE = 1e-5  # latents are float32


def engine_of(cache: CacheConfig, *, chunks: int = CHUNKS, pages: int = 200, model: Any = None) -> Engine:
    """An engine in float64: what pages of another layout are rounded to is then far below what is asked here."""
    shape = VideoShape((2,) * chunks, 8, 2, 2)
    return Engine(model or small_model(torch.float64), shape, ONE_STEP, cache, pages=pages, reencoder=StandIn())


def switched(*frames: int) -> dict[int, Tensor]:
    return {frame: random_text() for frame in frames}


def contents(engine: Engine, stream: Stream) -> Tensor:
    """Keys and values that a video sees, [layers, 2, tokens, heads, head_dim]."""
    runs = engine.pool.runs(stream.cache.tables)
    read = [[engine.pool.read(layer, run) for run in runs] for layer in range(engine.pool.keys.shape[0])]
    return torch.stack([torch.stack([torch.cat([pair[which][0] for pair in layer]) for which in (0, 1)]) for layer in read])


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
def test_branches_follow_the_prompts_of_the_whole_video(cache: CacheConfig) -> None:
    """Without noises of their own they are a part of what `generate` makes, with prompts that change before, at and after the pivot."""
    engine, text, start = engine_of(cache), random_text(), 2 * PIVOT
    switches = switched(4, start, start + 2)
    video = engine.generate(text, KeyedNoise(engine.shape, NAME), switches=switches)
    with engine.rollout(text, NAME, pivot=PIVOT, members=2, plan=NoisePlan(0.0), horizon=2, switches=switches, kept=4) as group:
        videos = group.videos()
        assert videos.shape[1] == group.prefix_latents.shape[1] + 6
        for branch in videos:
            torch.testing.assert_close(branch, video[0, start + 6 - videos.shape[1] : start + 6], rtol=0, atol=TOLERANCE)
        assert torch.equal(group.text, switches[start]) and torch.equal(group.text_of(PIVOT + 2), switches[start + 2])
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("cache", [CACHES["global"], CACHES["longlive"], CACHES["no global sink"]], ids=["global", "sink", "no sink"])
def test_pages_of_prompts_that_change_within_the_horizon(cache: CacheConfig) -> None:
    engine = engine_of(cache)
    for pivot in (0, 1, PIVOT):
        for frames in ((2 * pivot + 2,), (2 * pivot + 4,), (2 * pivot + 2, 2 * pivot + 4)):
            switches = switched(*frames)
            planned = engine.plan(pivot, 3, horizon=2, switches=[frame // 2 for frame in frames])
            engine.pool.peak_in_use = 0
            with engine.rollout(random_text(), NAME, pivot=pivot, members=3, plan=NoisePlan(0.5), horizon=2, switches=switches):
                assert engine.pool.peak_in_use == planned.pages
            assert planned.pages >= plan_pages(cache, engine.shape.chunk_frames, pivot, 3, horizon=2).pages
    assert engine.pool.pages_in_use == 0


def test_a_later_chunk_is_predicted_under_its_own_prompt() -> None:
    """Every chunk explores, and the prompt changes among them: the predictions are the rollout's."""
    engine, switches = engine_of(CACHES["longlive"]), switched(4, 2 * PIVOT + 2)
    plan = NoisePlan(0.5, chunks=None)
    with engine.rollout(random_text(), NAME, pivot=PIVOT, members=2, plan=plan, horizon=2, switches=switches) as group:
        assert list(group.explored) == [PIVOT, PIVOT + 1, PIVOT + 2]
        for chunk, explored in group.explored.items():
            samples = group.samples(torch.tensor([0, 0]), torch.tensor([0, 1]), chunk)
            torch.testing.assert_close(engine.predict(group, samples).detach(), explored.predictions[0], rtol=0, atol=TOLERANCE)
            assert engine.pool.pages_in_use == group.prefix.cache.frames


@pytest.mark.parametrize("cache", [CACHES["global"], CACHES["longlive"], CACHES["krea"]], ids=["global", "longlive", "krea"])
def test_forks_of_one_video_are_the_groups_made_one_by_one(cache: CacheConfig) -> None:
    """With prompts that change; and the video between them is `generate`'s."""
    engine, text, switches = engine_of(cache), random_text(), switched(6, 10)
    branching = Branching(2, NoisePlan(0.5), horizon=1, kept=2)
    groups = list(engine.forks(text, NAME, [1, 5, PIVOT], branching, switches))
    held = {page for group in groups for page in group.prefix.cache.tables[0].pages}
    assert engine.pool.pages_in_use == len(held), "groups share the pages of what they both see"
    assert [group.fork for group in groups] == [0, 1, 2] and len({group.key for group in groups}) == 3
    video = engine.generate(text, KeyedNoise(engine.shape, NAME), switches=switches)
    for group in groups:
        with engine.rollout(text, NAME, pivot=group.pivot, members=2, plan=NoisePlan(0.5), horizon=1, switches=switches, kept=2) as alone:
            pairs = [(made.videos(), made.predictions, contents(engine, made.prefix), made.text) for made in (group, alone)]
            for together, apart in zip(*pairs):
                torch.testing.assert_close(together, apart, rtol=0, atol=TOLERANCE)
        prefix = group.prefix_latents
        torch.testing.assert_close(prefix, video[:, 2 * group.pivot - prefix.shape[1] : 2 * group.pivot], rtol=0, atol=TOLERANCE)
        group.release()
    assert engine.pool.pages_in_use == 0


def test_forks_that_are_released_in_turn_are_the_groups_made_one_by_one_bit_for_bit() -> None:
    """Pages then lie as they do for a single group, and nothing is rounded differently."""
    engine, text = engine_of(CacheConfig(), model=small_model()), random_text()
    groups = []
    for group in engine.forks(text, NAME, [1, 5, PIVOT], Branching(3, NoisePlan(0.5), horizon=1)):
        groups.append((group.pivot, group.tails, group.predictions, group.prefix_latents))
        group.release()
    for pivot, *parts in groups:
        with engine.rollout(text, NAME, pivot=pivot, members=3, plan=NoisePlan(0.5), horizon=1) as alone:
            assert all(torch.equal(a, b) for a, b in zip(parts, (alone.tails, alone.predictions, alone.prefix_latents)))
    video = engine.generate(text, KeyedNoise(engine.shape, NAME))
    assert torch.equal(groups[-1][-1], video[:, : 2 * PIVOT])


def test_a_failure_anywhere_in_the_stream_leaves_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, switches = engine_of(CACHES["longlive"]), switched(6, 10)
    forward, calls = engine.model.forward, 0

    def fails(at: int) -> Callable[..., Any]:
        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        return broken

    for at in (1, 5, 9, 14):
        calls = 0
        monkeypatch.setattr(engine.model, "forward", fails(at))
        groups: list[Group] = []
        with pytest.raises(KeyboardInterrupt):
            for group in engine.forks(random_text(), NAME, [2, 5], Branching(2, NoisePlan(0.5), horizon=1), switches):
                groups.append(group)
        for group in groups:
            group.release()
        assert engine.pool.pages_in_use == 0, at
    monkeypatch.setattr(engine.model, "forward", forward)
    forks = engine.forks(random_text(), NAME, [2, 5], Branching(2, NoisePlan(0.5), horizon=1), switches)
    next(forks).release()
    forks.close()
    assert engine.pool.pages_in_use == 0, "nobody asks for the second group"
    with pytest.raises(ValueError, match="pivot 5, 2 is not a chunk .* pivots rise"):
        next(engine.forks(random_text(), NAME, [5, 2], Branching(2, NoisePlan(0.5))))


@pytest.mark.parametrize("frames", SWITCHES.values(), ids=SWITCHES.keys())
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
def test_a_rebuilt_context_is_the_rollouts(cache: CacheConfig, frames: list[int]) -> None:
    """Keys and values, out of as little as was kept; the replay is then the rollout's, too. What is forgotten is not seen."""
    engine, switches = engine_of(cache), switched(*frames)
    options = {"pivot": PIVOT, "members": 2, "plan": NoisePlan(0.5), "horizon": 0, "switches": switches}
    text = random_text()
    with engine.rollout(text, NAME, **options) as whole, engine.rollout(text, NAME, **options, kept=0) as group:
        torch.testing.assert_close(group.tails, whole.tails, rtol=0, atol=TOLERANCE)
        expected = contents(engine, group.prefix)
        assert len(group.history.events) <= len(whole.history.events)
        rolled_out = engine.predict(group, group.samples(torch.tensor([0, 0]), torch.tensor([0, 1]))).detach()
        group.put_away()
        engine.bring_back(group)
        torch.testing.assert_close(contents(engine, group.prefix), expected, rtol=0, atol=1e-11)
        again = engine.predict(group, group.samples(torch.tensor([0, 0]), torch.tensor([0, 1]))).detach()
        torch.testing.assert_close(again, rolled_out, rtol=0, atol=TOLERANCE)
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("name", ["longlive", "no global sink", "self forcing"])
def test_a_history_that_begins_a_chunk_too_late_gives_another_context(name: str) -> None:
    """So what is kept is what is needed, and no more; the sink depends on the prompt switch that wrote it."""
    engine, switches = engine_of(CACHES[name]), switched(4, 12)
    with engine.rollout(random_text(), NAME, pivot=PIVOT, members=2, plan=NoisePlan(0.5), horizon=0, switches=switches, kept=0) as group:
        expected, events = contents(engine, group.prefix), group.history.events
        early = [event for event in events if event.frame < 4]
        assert bool(early) == (name != "no global sink")
        first_seen = next(event for event in events if isinstance(event, Appended) and event.frame >= 4)
        for missing in [first_seen, *(event for event in events if isinstance(event, Switched))]:
            history = History(group.history.text, [event for event in events if event is not missing])
            rebuilt = engine.rebuild(history)
            found = contents(engine, rebuilt)
            assert found.shape != expected.shape or (found - expected).abs().max() > 1e-3
            rebuilt.cache.release()
    assert engine.pool.pages_in_use == 0


def test_memory_does_not_grow_with_the_video() -> None:
    """Pages, tensors at the peak, and what waits in host memory: the same for 20, 40 and 80 chunks whose prompt changes now and then."""
    cache = CacheConfig(variant="longlive_infinity", window=6, sink=2)
    model, measured = small_model(num_layers=1), []
    for chunks in (8, 20, 40, 80):  # the first one makes the tables that all read
        planned = pages_for(cache, (2,) * chunks, 3, horizon=2, switches=[range(4, chunks, 4)])
        engine = engine_of(cache, chunks=chunks, pages=planned, model=model)
        text, switches = random_text(), switched(*range(8, 2 * chunks, 8))
        constants = [engine.pool.keys, engine.pool.values, *model.parameters(), text, *switches.values()]
        options = {"members": 3, "plan": NoisePlan(0.5), "horizon": 2, "switches": switches, "kept": 8}
        with LiveBytes(constants) as live, engine.rollout(text, NAME, pivot=chunks - 3, **options) as group:
            waiting = sum(chunk.latents.nbytes for chunk in group.history.chunks)
            measured.append((engine.pool.peak_in_use, live.peak, live.now, waiting, group.prefix_latents.shape[1]))
    assert measured[1] == measured[2] == measured[3] and measured[1][-1] == 8, measured


def test_the_first_ratio_is_one_deep_in_a_video() -> None:
    """Beyond the window, with prompts that change, on two forks of one video; their anchors are drawn apart."""
    engine = fresh_engine(cache=CACHES["longlive"], shape=VideoShape((2,) * CHUNKS, 8, 2, 2), sampler=ONE_STEP)
    objective = CopoObjective(engine, CopoSettings(anchors_per_update=3, updates=1))
    stepper = Stepper(torch.optim.AdamW(adapter_parameters(engine.model), lr=1e-3))
    branching = Branching(6, NoisePlan(0.5), horizon=0, kept=0)
    groups = list(engine.forks(random_text(), NAME, [5, PIVOT], branching, switched(4, 12)))
    statistics = objective.update([(group, torch.linspace(-1, 1, 6)) for group in groups], stepper)
    assert statistics["update1/ratio_max"] == 0 and statistics["gradient_norm"] > 0
    drawn = [objective.draw_items(group, 0).anchors.tolist() for group in groups]
    assert drawn[0] != drawn[1]
    for group in groups:
        group.release()
    assert engine.pool.pages_in_use == 0
