"""A group's videos, and samples of its chunks: indexing and noising against plain loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arcopo_fast.rollout.group import Explored, Group, Samples
from arcopo_fast.rollout.history import History
from arcopo_fast.rollout.noise import GroupId
from arcopo_fast.rollout.sampler import StepRule, Steps

MEMBERS, PIVOT, CHUNKS = 4, 1, (2, 3, 1, 2)  # frames of each chunk
STEPS = Steps((1000.0, 700.0, 250.0), (1.0, 0.7, 0.25))


def group_of(tail: int) -> Group:
    """A group whose tails have so many frames."""
    released: list[int] = []
    prefix: Any = SimpleNamespace(cache=SimpleNamespace(release=lambda: released.append(1)), released=released)
    pair = torch.randn(2, len(STEPS), MEMBERS, CHUNKS[PIVOT], 2, 3, 3)
    latents, tails = torch.randn(1, CHUNKS[0], 2, 3, 3), torch.randn(MEMBERS, tail, 2, 3, 3)
    explored = {PIVOT: Explored(STEPS, *pair)}
    history = History.of(torch.randn(1, 5, 10), [latents])
    return Group(GroupId(7), PIVOT, prefix, history, tails, explored, StepRule("consistency"))


def test_samples_of_the_pivot_are_what_the_rollout_had_there() -> None:
    group, chosen, members = group_of(6), torch.tensor([2, 0, 2, 1]), torch.tensor([3, 3, 0, 1])
    samples = group.samples(chosen, members)
    assert (samples.chunk, len(samples), group.size) == (PIVOT, 4, MEMBERS)
    for index, (step, member) in enumerate(zip(chosen.tolist(), members.tolist())):
        assert torch.equal(samples.x[index], group.inputs[step, member])
        assert samples.timesteps[index] == STEPS.timesteps[step] and samples.sigmas[index] == torch.tensor(STEPS.sigmas[step])


def test_chunks_and_videos_of_a_group() -> None:
    group = group_of(sum(CHUNKS[PIVOT:]))
    videos = group.videos()
    assert videos.shape == (MEMBERS, sum(CHUNKS), 2, 3, 3)
    own = group.own_chunks(CHUNKS)
    assert list(own) == [1, 2, 3]
    for chunk, latents in own.items():
        first = sum(CHUNKS[:chunk])
        assert torch.equal(latents, videos[:, first : first + CHUNKS[chunk]])
    assert all(torch.equal(video[: CHUNKS[0]], group.prefix_latents[0]) for video in videos)
    stored = group_of(CHUNKS[PIVOT])  # out of a buffer, which keeps the pivot chunk alone
    assert list(stored.own_chunks(CHUNKS)) == [PIVOT] and torch.equal(stored.own_chunks(CHUNKS)[PIVOT], stored.tails)


def test_noised_samples_are_those_of_the_formula() -> None:
    """x_t = (1 - sigma) x_0 + sigma noise, in float64, member by member."""
    clean, noise, step = torch.randn(MEMBERS, 3, 2, 3, 3), torch.randn(MEMBERS, 3, 2, 3, 3), torch.tensor([0, 2, 1, 1])
    samples = Samples.noised(2, clean, noise, STEPS, step)
    assert samples.chunk == 2 and samples.members.tolist() == list(range(MEMBERS)) and samples.steps is None
    for member, at in enumerate(step.tolist()):
        sigma = STEPS.sigmas[at]
        expected = (1 - sigma) * clean[member].double() + sigma * noise[member].double()
        torch.testing.assert_close(samples.x[member].double(), expected, rtol=1e-6, atol=1e-6)
        assert samples.timesteps[member] == STEPS.timesteps[at]


@pytest.mark.parametrize("noised", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_parts_of_samples_are_the_samples(size: int, noised: bool) -> None:
    group, step = group_of(6), torch.tensor([2, 0, 1, 1])
    pair = torch.randn(2, MEMBERS, 3, 2, 3, 3)
    samples = Samples.noised(2, *pair, STEPS, step) if noised else group.samples(step, torch.arange(MEMBERS))
    parts = samples.split(size)
    assert [len(part) for part in parts] == [min(size, 4 - first) for first in range(0, 4, size)]
    assert {part.chunk for part in parts} == {samples.chunk}

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    for name in ("members", "x", "timesteps", "sigmas", *([] if noised else ["steps"])):
        assert torch.equal(joined(name), getattr(samples, name)), name
    assert all((part.steps is None) == noised for part in parts)


def test_a_group_gives_its_prefix_back_whatever_happens() -> None:
    group: Any = group_of(6)
    prefix = group.prefix
    with pytest.raises(RuntimeError), group as entered:
        assert entered is group and not prefix.released
        raise RuntimeError
    assert prefix.released == [1] and group.prefix is None
    group.release()
    assert prefix.released == [1], "pages are given back once"
