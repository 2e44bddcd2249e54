"""The draws that differ between two members of a group, method by method: exactly these, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.adapted import GROUP, adapted_engine
from support.models import GLOBAL, SAMPLER, SHAPE, random_text

from arcopo_fast.config.schema import objective_class
from arcopo_fast.config.sections import SamplerConfig
from arcopo_fast.rollout import noise as module
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.stream import VideoShape

ODE = SamplerConfig(kind="ode", steps=[1000, 750, 500], warp=True, shift=5.0)
WHOLE = VideoShape((8,), *SHAPE.chunk(0)[1:])
"""A video of one chunk, as without autoregression."""
STEPS = range(len(SAMPLER.steps) - 1)
"""Steps after which there is noise."""


def initial(*chunks: int) -> set[tuple[Any, ...]]:
    return {("neighbour", chunk) for chunk in chunks}


def renoise(*chunks: int) -> set[tuple[Any, ...]]:
    return {("own renoise", chunk, step) for chunk in chunks for step in STEPS}


CASES: dict[str, tuple[str, dict[str, Any], int, set[tuple[Any, ...]]]] = {
    "AR-CoPO": ("copo", {}, 1, initial(1)),
    "AR-CoPO, first chunk": ("copo", {}, 0, initial(0)),
    "SDE-GRPO": ("sde_grpo", {}, 2, renoise(2)),
    "SDE-GRPO, fresh": ("sde_grpo", {"init_noise": "fresh"}, 2, renoise(2) | initial(2)),
    "SDE-GRPO, all chunks": ("sde_grpo", {"explore": "all"}, 1, renoise(1, 2, 3)),
    "SDE-GRPO, independent": ("sde_grpo", {"explore": "all", "init_noise": "fresh"}, 0, renoise(0, 1, 2, 3) | initial(0, 1, 2, 3)),
    "Astrolabe": ("nft", {}, 1, renoise(1, 2, 3) | initial(1, 2, 3)),
    "Astrolabe, independent": ("nft", {}, 0, renoise(0, 1, 2, 3) | initial(0, 1, 2, 3)),
    "Astrolabe, two chunks": ("nft", {"explored_chunks": 2}, 1, renoise(1, 2) | initial(1, 2)),
    "Neighbor GRPO": ("copo", {"distance": "flow_matching"}, 0, initial(0)),
}
"""The objective, settings, pivot and own draws of a member, for each method."""


def plan_of(engine: Engine, kind: str, settings: dict[str, Any]) -> NoisePlan:
    objective = objective_class(kind)
    return objective(engine, objective.Settings.model_validate(settings)).noise_plan(0.3)


@pytest.mark.parametrize("case", CASES)
def test_the_draws_that_differ_between_two_members_are_those_of_the_method(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings, pivot, own = CASES[case]
    single = case == "Neighbor GRPO"
    engine = adapted_engine(shape=WHOLE, sampler=ODE, cache=GLOBAL) if single else adapted_engine()
    plan, text, name = plan_of(engine, kind, settings), random_text(), GroupId(5, 2, 1)
    drawn: set[tuple[Any, ...]] = set()
    known = module.normal
    monkeypatch.setattr(module, "normal", lambda shape, *key: (drawn.add(key), known(shape, *key))[1])

    def draws(member: int) -> set[tuple[Any, ...]]:
        drawn.clear()
        with engine.rollout(text, name, pivot=pivot, members=GROUP, plan=plan, part=range(member, member + 1)):
            assert all(key[:3] == name for key in drawn)
            return {key[3:] for key in drawn}

    first, second = draws(0), draws(4)
    assert {key[:-1] for key in first - second} == {key[:-1] for key in second - first} == own
    assert {key[-1] for key in first - second} == {0} and {key[-1] for key in second - first} == {4}
    chunks = range(engine.shape.chunks)
    assert {key for key in first & second if key[0] == "initial"} >= {("initial", chunk) for chunk in chunks}
    shared = {("renoise", chunk, step) for chunk in chunks for step in STEPS if ("own renoise", chunk, step) not in own}
    assert {key for key in first & second if key[0] == "renoise"} == (set() if single else shared)
    assert plan.initial == {"copo": 0.3, "nft": 1.0}.get(kind, float(settings.get("init_noise") == "fresh"))


@pytest.mark.parametrize("explore", ["pivot", "all"])
def test_the_chunks_that_explore(explore: str) -> None:
    """With `explore: all` every member draws for itself at every step of every chunk from the pivot on, and the group keeps them all."""
    engine = adapted_engine()
    plan = plan_of(engine, "sde_grpo", {"init_noise": "fresh", "explore": explore})
    with engine.rollout(random_text(), GroupId(int(torch.randint(10**6, ()))), pivot=1, members=GROUP, plan=plan) as group:
        chunks = list(range(1, SHAPE.chunks)) if explore == "all" else [1]
        assert list(group.explored) == chunks
        noise = KeyedNoise(SHAPE, group.id)
        for chunk, explored in group.explored.items():
            assert torch.equal(explored.inputs[0], noise.neighbors(chunk, range(GROUP), 1.0))
            for step in range(len(explored.steps) - 1):
                transition = group.rule.transition(explored.steps.sigmas[step], explored.steps.next_sigma(step))
                mean = transition.mean(explored.inputs[step], explored.predictions[step])
                drawn = (explored.inputs[step + 1] - mean) / transition.std
                torch.testing.assert_close(drawn, noise.own(chunk, step, range(GROUP)), rtol=0, atol=1e-4)
        latents = group.own_chunks(SHAPE.chunk_frames)
        assert all(torch.equal(explored.predictions[-1], latents[chunk]) for chunk, explored in group.explored.items())
