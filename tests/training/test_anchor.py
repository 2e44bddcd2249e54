"""The anchor: one more branch of a group, with no noise of its own, whose scores are the baseline of the advantages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.commands import SMALL_COPO
from support.models import GLOBAL, SAMPLER, SHAPE, random_text, small_engine, small_model
from support.ranks import run_ranks
from torch import Tensor

from arcopo_fast.build import pool_pages
from arcopo_fast.config.reading import load_config
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_state, load_adapter_state
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.planning.lockstep import uneven
from arcopo_fast.planning.spread import Spread
from arcopo_fast.reports.curves import health
from arcopo_fast.rewards.base import RewardError
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Branching
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.sampler import StepRule
from arcopo_fast.runtime.distributed import World
from arcopo_fast.train import one_iteration
from arcopo_fast.training.buffered import BufferedGroups, policy_of, recipe_of, store
from arcopo_fast.training.groups import Outcome
from arcopo_fast.training.lessons import LearningWatch, reward_record
from arcopo_fast.training.selftest import self_test
from arcopo_fast.training.trainer import Trainer

MEAN = [*SMALL_COPO, "video.chunks=3", "sampler.steps=[1000,300]", "rollout.pivot=2", "rollout.noise_strength=0.85", "objective.updates=1"]
SETTINGS = [*MEAN, "objective.advantage_baseline=anchor"]


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(load_config("toy", SETTINGS))


@pytest.fixture(autouse=True)
def no_page_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "trainer" in request.fixturenames:
        assert request.getfixturevalue("trainer").engine.pool.pages_in_use == 0


@pytest.mark.parametrize("plan", [NoisePlan(0.6), NoisePlan(1.0, StepRule("flow_sde", 0.5), chunks=None)], ids=["initial", "every step"])
def test_it_is_a_branch_of_strength_zero_and_changes_no_member(plan: NoisePlan) -> None:
    """Bit for bit, also where members have noises of their own at every step; in the pages of one branch of a wave that is done."""
    model, text, name = small_model(), random_text(), GroupId(3)
    engine = Engine(model, SHAPE, SAMPLER, GLOBAL, pages=small_engine(model).plan(1, 2, horizon=1).pages)

    def made(branches: int, plan: NoisePlan, **settings: object) -> tuple[Tensor, list[Tensor], Tensor | None]:
        with engine.rollout(text, name, pivot=1, horizon=1, members=branches, plan=plan, **settings) as group:
            explored = [states for part in group.explored.values() for states in (part.inputs, part.predictions)]
            return group.tails, explored, group.anchor

    plain, states, none = made(4, plan, branches_per_wave=2)
    tails, same, anchor = made(4, plan, branches_per_wave=2, anchor=True)
    assert none is None and anchor is not None and anchor.shape == (1, *tails.shape[1:])
    assert torch.equal(plain, tails) and all(map(torch.equal, states, same)) and len(states) == len(same)
    assert not any(torch.equal(anchor[0], member) for member in tails)
    zero, _, _ = made(3, NoisePlan(0.0), branches_per_wave=2)
    assert torch.equal(zero[2:], anchor), "a wave of one after one of two"
    video = engine.generate(text, KeyedNoise(engine.shape, name))[:, 2:6]
    torch.testing.assert_close(anchor, video, rtol=0, atol=1e-5)
    assert torch.equal(made(2, plan, branches_per_wave=1, anchor=True)[2], video), "where pages lie as in a video alone"
    assert engine.pool.pages_in_use == 0
    forks = small_engine(model).forks(text, name, [1, 2], Branching(2, plan, horizon=1, anchor=True))
    for group, pivot in zip(forks, (1, 2)):
        with group:
            assert group.anchor is not None
            expected = engine.generate(text, KeyedNoise(engine.shape, name))[:, 2 * pivot : 2 * pivot + 4]
            torch.testing.assert_close(group.anchor, expected, rtol=0, atol=1e-5)


def test_a_group_is_the_same_with_and_without(trainer: Trainer) -> None:
    """Members, their frames and their scores; and the anchor is judged as a video of its own under the same prompt."""
    rollouts, config = trainer.rollouts, trainer.config
    with rollouts.judged(1, 0).group as group:
        assert group.size == config.rollout.group_size and group.anchor is None
    plain = Trainer(load_config("toy", MEAN)).rollouts
    judged, expected = rollouts.judged(1, 0), plain.judged(1, 0)
    with judged.group as group, expected.group as other:
        assert torch.equal(group.tails, other.tails) and torch.equal(group.inputs, other.inputs)
        assert judged.rewards.keys() == expected.rewards.keys() and expected.anchor is None
        assert all(torch.equal(judged.rewards[name], values) for name, values in expected.rewards.items())
    assert judged.anchor is not None and judged.anchor.keys() == judged.rewards.keys()
    total = sum(weight * judged.rewards[name].double() for name, weight in config.score_weights.items())
    compared = sum(weight * judged.anchor[name] for name, weight in config.score_weights.items())
    found, z = judged.advantages(config), zscore(total, config.objective.advantage_std_floor, anchor=compared)
    torch.testing.assert_close(found, z / z.std(correction=0), rtol=0, atol=1e-9)
    assert abs(found.mean()) > 1e-6 and expected.advantages(plain.config).mean().abs() < 1e-9


def test_what_is_logged_and_what_becomes_of_a_score_that_failed() -> None:
    """Its window teaches the group nothing, as if every member's score had failed; it is counted, and too often it ends the run."""
    windows = "judge.windows={a: {chunks: [0, 0], rewards: [x]}, b: {chunks: [0, 1], rewards: [y]}}"
    config = load_config("toy", [*SETTINGS, "rewards={x: 1.0, y: 2.0}", windows, "train.iterations=3"])
    rewards = {"a/x": torch.tensor([1.0, 2, 4]), "b/y": torch.tensor([3.0, 2, 2])}

    def outcome(**anchor: float) -> Outcome:
        named = {f"{name}/{reward}": anchor[reward] for name, reward in (("a", "x"), ("b", "y"))}
        return Outcome(0, 1, rewards, torch.zeros(3), named)

    record = reward_record(config, [outcome(x=1.5, y=1.0), outcome(x=0.5, y=math.nan)])
    assert (record["anchor"], record["anchor/a/x"], record["anchor/b/y"]) == (3.5, 1.0, 1.0)
    assert (record["failed_scores"], record["failed_anchor_scores"], record["partly_scored"]) == (0, 1, 3)
    assert {"anchor", "failed_anchor_scores"} <= {chart.name for chart in health(config)}
    mean = load_config("toy", [*MEAN, "rewards={x: 1.0, y: 2.0}", windows])
    assert not [name for name in reward_record(mean, [outcome(x=1.5, y=1.0)._replace(anchor=None)]) if "anchor" in name]
    watch = LearningWatch(config)
    for _ in range(2):
        watch.check([outcome(x=math.nan, y=1.0)])
    with pytest.raises(RewardError, match="no video and anchor of one group of 3 iterations .* got all its scores: .* 'a/x' failed for 1"):
        watch.check([outcome(x=math.nan, y=1.0)])


def test_a_buffer_keeps_its_scores(trainer: Trainer, tmp_path: Path) -> None:
    """One without them is refused for this baseline; one with them serves the mean, too."""
    config, parts = trainer.config, (trainer.generator, trainer.engine, trainer.objective)
    policy, judged = policy_of(config, trainer.generator, trainer.objective), trainer.rollouts.judged(1, 0)
    plain, anchored = load_config("toy", MEAN), config
    assert policy == policy_of(plain, trainer.generator, trainer.objective)
    with judged.group:
        for name, recipe in {"with": anchored, "without": plain}.items():
            buffer = Buffer.create(tmp_path / name, policy, recipe_of(recipe, trainer.prompts, {}), groups=1)
            for index in buffer.missing(1):
                tensors, about = store(judged, trainer.shape)
                kept = {key: value for key, value in tensors.items() if name == "with" or not key.startswith("anchor/")}
                buffer.write(index, kept, about)
    with pytest.raises(UserError, match="advantage_baseline"):
        Buffer.create(tmp_path / "with", policy, recipe_of(plain, trainer.prompts, {}))
    again = BufferedGroups(anchored, *parts, Buffer.open(tmp_path / "with", policy)).judged(1, 0)
    with again.group:
        assert again.anchor == judged.anchor and torch.equal(again.advantages(anchored), judged.advantages(anchored))
        assert "buffer/anchor" in reward_record(
            load_config("toy", [*SETTINGS, "train.mode=semi_on_policy", "train.buffer=x"]), [again.outcome(0, config)]
        )
    for name in ("with", "without"):
        with (again := BufferedGroups(plain, *parts, Buffer.open(tmp_path / name, policy)).judged(1, 0)).group:
            assert abs(again.advantages(plain).mean()) < 1e-9 and again.outcome(0, plain).anchor is None
    with pytest.raises(UserError, match="no anchor for objective.advantage_baseline=anchor; collect a buffer with that setting"):
        BufferedGroups(anchored, *parts, Buffer.open(tmp_path / "without", policy))


def test_a_run_that_goes_on_has_the_same_iterations(trainer: Trainer) -> None:
    start = {name: tensor.clone() for name, tensor in adapter_state(trainer.generator.model).items()}
    records = []
    for _ in range(2):
        load_adapter_state(trainer.generator.model, start)
        trainer.optimizer.state.clear()
        records.append(one_iteration(trainer, LearningWatch(trainer.config), 2))
    load_adapter_state(trainer.generator.model, start)
    assert [record.pop("time") for record in records] and records[0] == records[1] and records[0]["failed_anchor_scores"] == 0
    assert json.dumps(records[0]) and math.isfinite(records[0]["anchor"])


def learned(world: World) -> tuple[dict[str, float], list[float], dict[str, float], Tensor]:
    """Return what an iteration logs, its advantages and its anchor's scores, and the adapter after it."""
    trainer, found = Trainer(load_config("toy", [*SETTINGS, "train.spread=branches"] if world.size > 1 else SETTINGS), world), []
    everybodys = trainer.everybodys
    trainer.everybodys = lambda own: found.extend(everybodys(own)) or found  # type: ignore[method-assign, func-returns-value]
    record = one_iteration(trainer, LearningWatch(trainer.config), 1)
    weights = torch.cat([tensor.flatten().double() for tensor in adapter_state(trainer.generator.model).values()])
    assert found[0].anchor is not None and trainer.engine.pool.pages_in_use == 0
    return {name: value for name, value in record.items() if name != "time"}, found[0].advantages.tolist(), found[0].anchor, weights


def test_ranks_that_share_a_group() -> None:
    """The last one makes the anchor, and all have its scores; they learn what one process does."""
    first, second = run_ranks(2, learned)
    assert first[:3] == second[:3] and torch.equal(first[3], second[3])
    record, advantages, anchor, weights = learned(World())
    assert first[0].keys() == record.keys() and first[2] == pytest.approx(anchor, abs=1e-5)
    assert first[1] == pytest.approx(advantages, abs=1e-3) and (first[3] - weights).norm() <= 1e-4 * weights.norm()


def test_plans_know_it() -> None:
    """No page more, since it is a wave of its own; a team's last rank has one more branch to make; weights that are divided refuse it."""
    anchored, plain = (load_config("toy", settings) for settings in (SETTINGS, MEAN))
    assert pool_pages(anchored) == pool_pages(plain)
    assert [Spread(1, ranks).work(anchored) - Spread(1, ranks).work(plain) for ranks in (1, 2, 3)] == [1, 0, 1]
    assert "makes the anchor of a group" in uneven(anchored, Spread(1, 3))[0][0] and not uneven(plain, Spread(1, 3))
    risks = load_config("self_forcing_astrolabe", ["objective.advantage_baseline=anchor"]).objective.risks(4, 2)
    assert [risk for risk in risks if "advantage_baseline=anchor moves the mean" in risk]


def test_the_self_test_looks_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = self_test(load_config("toy", SETTINGS))
    next(found)
    finding = next(found)
    assert finding.subject == "the anchor" and finding.holds
    found.close()
    monkeypatch.setattr(KeyedNoise, "neighbors", lambda self, chunk, members, sigma: self._for_each("neighbour", chunk, members))
    found = self_test(load_config("toy", SETTINGS))
    next(found)
    assert not next(found).holds
    found.close()
