"""Replaced noise: forked videos are what independent whole generations with that noise would be, and only what was replaced counts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.models import SAMPLER, SHAPE, random_text, small_engine, small_model
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig
from arcopo_fast.evaluation.influence import mean_squared_change, noise_influence, noise_name, noise_tensors, substitute
from arcopo_fast.rollout.cache import pages_for
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise

POLICIES = {
    "global": CacheConfig(),
    "window": CacheConfig(window=4),
    "window and sink": CacheConfig(window=5, sink=1),
    "infinity rope": CacheConfig(variant="infinity_rope", window=4, sink=1),
    "krea": CacheConfig(variant="krea", window=5, sink=1),
}
TENSORS: list[int | None] = [None, 0, 1]  # of the three steps of SAMPLER


@dataclass
class Draws:
    """A video's noise as tensors: what chunk starts from, and what follows its steps."""

    tensors: dict[tuple[int, int | None], Tensor]

    def initial(self, chunk: int) -> Tensor:
        return self.tensors[chunk, None]

    def renoise(self, chunk: int, step: int) -> Tensor:
        return self.tensors[chunk, step]


def draws() -> Draws:
    return Draws({(chunk, step): torch.randn(1, *SHAPE.chunk(chunk)) for chunk in range(SHAPE.chunks) for step in TENSORS})


def draw(source: KeyedNoise, chunk: int, step: int | None) -> Tensor:
    return source.initial(chunk) if step is None else source.renoise(chunk, step)


def whole(latents: list[Tensor]) -> Tensor:
    rows = len(latents[-1])
    return torch.cat([chunk.expand(rows, *chunk.shape[1:]) for chunk in latents], dim=1)


@pytest.mark.parametrize(
    "policy, dtype, branches",
    [*((name, torch.float64, None) for name in POLICIES), ("window and sink", torch.float64, 3), ("global", torch.float32, 4)],
)
def test_forked_videos_equal_independent_ones(policy: str, dtype: torch.dtype, branches: int | None) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    rows, model, text = branches or 7, small_model(dtype), random_text()
    engine = Engine(model, SHAPE, SAMPLER, POLICIES[policy], pages=pages_for(POLICIES[policy], SHAPE.chunk_frames, rows))
    alone = small_engine(model, cache=POLICIES[policy], branches=1)
    noise, others = draws(), [draws(), draws()]
    seen = []
    for videos in substitute(engine, text, noise, others, branches=branches):
        latents = whole(videos.latents)
        assert len(latents) == 1 + len(videos.replaced) <= rows
        changed = [{(videos.pivot, step): others[other].tensors[videos.pivot, step]} for other, step in videos.replaced]
        expected = torch.cat([alone.generate(text, Draws(noise.tensors | change)) for change in [{}, *changed]])
        torch.testing.assert_close(latents, expected, rtol=0, atol=tolerance)
        assert mean_squared_change(videos.tail).min() > 1e-6, "every tensor must matter"
        assert torch.equal(videos.tail, latents[:, 2 * videos.pivot :])
        seen += [(videos.pivot, *tensor) for tensor in videos.replaced]
    assert seen == [(pivot, other, step) for pivot in range(4) for other in range(2) for step in TENSORS]
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tensor_replaced_by_itself_changes_nothing(dtype: torch.dtype) -> None:
    """Up to rounding: a library may treat the last rows of a batch by another kernel."""
    engine, noise = small_engine(small_model(dtype)), draws()
    for videos in substitute(engine, random_text(), noise, [noise]):
        for chunk in videos.latents[videos.pivot :]:
            largest = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
            torch.testing.assert_close(chunk, chunk[:1].expand_as(chunk), rtol=0, atol=largest)


def test_pivots_can_be_chosen_and_left_early() -> None:
    engine, text, noise, others = small_engine(small_model(torch.float64)), random_text(), draws(), [draws()]
    every = {videos.pivot: videos for videos in substitute(engine, text, noise, others)}
    some = list(substitute(engine, text, noise, others, pivots={2, 0}))
    assert [videos.pivot for videos in some] == [0, 2]
    for videos in some:
        torch.testing.assert_close(whole(videos.latents), whole(every[videos.pivot].latents), rtol=0, atol=1e-12)
    assert not list(substitute(engine, text, noise, others, pivots=()))
    left = substitute(engine, text, noise, others)
    next(left)
    assert engine.pool.pages_in_use == 0, "before the first chunk there is no context"
    next(left)
    assert engine.pool.pages_in_use == 2
    left.close()
    assert engine.pool.pages_in_use == 0
    with pytest.raises(ValueError, match="at least 2"):
        next(substitute(engine, text, noise, others, branches=1))


def test_what_a_sampler_does_not_draw_is_not_replaced() -> None:
    model = small_model()
    samplers = {
        "one step": (SAMPLER.model_copy(update={"steps": [1000]}), [[None]] * 4),
        "ode": (SAMPLER.model_copy(update={"kind": "ode"}), [[None]] * 4),
        "first chunk": (SAMPLER.model_copy(update={"first_chunk_steps": [1000, 500]}), [[None, 0], TENSORS, TENSORS, TENSORS]),
    }
    for name, (sampler, expected) in samplers.items():
        engine = small_engine(model, sampler=sampler)
        assert [noise_tensors(engine, chunk) for chunk in range(4)] == expected, name
        replaced = [[step for _, step in videos.replaced] for videos in substitute(engine, random_text(), draws(), [draws()])]
        assert replaced == expected, name


def test_noise_influence_is_the_change_of_whole_videos() -> None:
    """Against every video generated by itself."""
    model, text, seed = small_model(torch.float64), random_text(2), int(torch.randint(2**31, ()))
    influence = noise_influence(model, text, SHAPE, SAMPLER, seed=seed)
    engine = small_engine(model)
    expected = {noise_name(step): [0.0] * 4 for step in TENSORS}
    assert list(expected) == ["initial", "renoise1", "renoise2"]
    for row in range(2):
        sources = (KeyedNoise(SHAPE, GroupId(seed + offset, group=row)) for offset in (0, 1))
        base, other = ({key: draw(source, *key) for key in draws().tensors} for source in sources)
        unchanged = engine.generate(text[row : row + 1], Draws(base))
        for chunk, step in base:
            changed = engine.generate(text[row : row + 1], Draws(base | {(chunk, step): other[chunk, step]}))
            expected[noise_name(step)][chunk] += (changed - unchanged).square().mean().item() / 2
    for name, values in expected.items():
        assert influence[name] == pytest.approx(values, rel=1e-9)
    largest = [max(values) for values in zip(expected["renoise1"], expected["renoise2"])]
    assert influence["ratio"] == pytest.approx([a / b for a, b in zip(expected["initial"], largest)], rel=1e-9)
