"""Noise by key: equal names give equal draws, any other name an independent one; neighbours keep the norm."""

from __future__ import annotations

import itertools

import pytest
import torch

from arcopo_fast.rollout.noise import GroupId, KeyedNoise, MemberNoise, NoisePlan, StackedNoise, normal
from arcopo_fast.rollout.sampler import StepRule
from arcopo_fast.rollout.stream import VideoShape

shape = VideoShape((3,) * 9, 16, 20, 30)


def test_a_draw_depends_on_its_name_only() -> None:
    seed = int(torch.randint(10**6, ()))
    torch.manual_seed(1)
    first = normal((4, 5), seed, 0, "initial", 2)
    torch.manual_seed(2)
    assert torch.equal(first, normal((4, 5), seed, 0, "initial", 2))
    assert not torch.equal(first, normal((4, 5), seed, 0, "initial", 3))


def test_every_part_of_the_name_counts() -> None:
    draws = []
    for seed, iteration, group in itertools.product((0, 1), repeat=3):
        noise = KeyedNoise(shape, GroupId(seed, iteration, group))
        draws += [noise.initial(0), noise.initial(1), noise.renoise(0, 0), noise.renoise(0, 1), noise.renoise(1, 0)]
        draws += list(noise.neighbors(0, range(2), 1.0).split(1))
    flat = torch.cat(draws).flatten(1)
    correlation = flat @ flat.T / flat.shape[1] - torch.eye(len(flat))
    assert correlation.abs().max() < 6 / flat.shape[1] ** 0.5, "two differently named draws are correlated"


def test_neighbours_keep_the_norm_and_share_the_centre() -> None:
    sigma, noise = 0.5, KeyedNoise(shape, GroupId(7))
    members, centre = noise.neighbors(1, range(12), sigma), noise.initial(1)
    size = centre.numel()
    assert members.square().mean() == pytest.approx(1.0, abs=0.02)
    assert ((members - members[:1])[1:].square().flatten(1).mean(1) - 2 * sigma**2).abs().max() < 10 / size**0.5
    assert ((members * centre).flatten(1).mean(1) - (1 - sigma**2) ** 0.5).abs().max() < 10 / size**0.5
    few = noise.neighbors(1, range(5), sigma)
    assert torch.equal(members[:5], few), "a member does not depend on the group's size"


def test_stacked_sources_are_rows() -> None:
    sources = [KeyedNoise(shape, GroupId(seed)) for seed in (3, 4)]
    stacked = StackedNoise(sources)
    assert torch.equal(stacked.renoise(2, 1), torch.cat([source.renoise(2, 1) for source in sources]))


@pytest.mark.parametrize("chunks", [1, 2, None])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_plan_says_which_noises_are_a_members_own(strength: float, chunks: int | None) -> None:
    """From the fork on, for so many chunks: eps_i = sqrt(1 - s^2) eps* + s delta_i; all other initial noises are the shared ones."""
    video, fork, members = VideoShape((2,) * 5, 2, 3, 4), 2, [3, 0, 5]
    shared = KeyedNoise(video, GroupId(7, 3, 1))
    noise = MemberNoise(shared, NoisePlan(strength, chunks=chunks), fork, members)
    for chunk in range(video.chunks):
        own = fork <= chunk < fork + (chunks or video.chunks)
        assert noise.is_own(chunk) == own
        drawn, centre = noise.initial(chunk), shared.initial(chunk)
        assert drawn.shape == (3, *video.chunk(chunk))
        for row, member in zip(drawn, members):
            delta = normal((1, *video.chunk(chunk)), *shared.id, "neighbour", chunk, member)
            expected = (1 - strength**2) ** 0.5 * centre.double() + strength * delta.double() if own else centre.double()
            torch.testing.assert_close(row[None].double(), expected, rtol=1e-6, atol=1e-6)
        for step in range(2):  # without a rule of the plan's, every re-noise is shared
            assert torch.equal(noise.renoise(chunk, step), shared.renoise(chunk, step))


def test_a_plan_with_a_rule_gives_each_member_its_own_renoises() -> None:
    video, members = VideoShape((2,) * 4, 2, 3, 4), [3, 0, 5]
    shared = KeyedNoise(video, GroupId(7, 3, 1))
    noise = MemberNoise(shared, NoisePlan(0.0, StepRule("consistency"), chunks=2), 1, members)
    rows = []
    for chunk in range(video.chunks):
        assert torch.equal(noise.initial(chunk), shared.initial(chunk).expand(3, *video.chunk(chunk)))
        for step in range(2):
            drawn = noise.renoise(chunk, step)
            if chunk in (1, 2):
                rows += list(drawn)
                alone = MemberNoise(shared, noise.plan, 1, [5]).renoise(chunk, step)
                assert torch.equal(drawn[2:], alone), "a member's draw does not depend on the others"
            else:
                assert torch.equal(drawn, shared.renoise(chunk, step))
    assert len({tuple(row.flatten().tolist()) for row in rows}) == len(rows) == 12
